"""What cannot be read from, or written to, other people's formats."""

from ummim.errors import UserError


class OfficialError(UserError, ValueError):
    """A checkpoint, size or model that does not fit an official format. One line, which names what does not fit."""
