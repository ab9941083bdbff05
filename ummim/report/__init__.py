"""``ummim report``: what runs have come to, on one page of HTML."""
