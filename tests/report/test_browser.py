"""The page in a real browser: it draws, its script runs, nothing complains and nothing is fetched."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import TINY_UM_MAE
from tests.report.conftest import MakeRun, record, write_metrics
from ummim.report.page import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTH, HEIGHT = 1280, 1500
PROBE = """<script>
const answers = [], gallery = document.querySelector(".gallery"), slider = gallery.querySelector("input");
slider.value = 0;
slider.dispatchEvent(new Event("input"));
answers.push([...gallery.querySelectorAll("img")].filter((image) => !image.hidden).map((image) => image.alt).join());
const chart = document.querySelector("svg.chart"), box = chart.getBoundingClientRect();
chart.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 25, clientY: box.top + 50}));
answers.push(document.getElementById("told").innerText);
document.querySelector("input.log").click();
answers.push(getComputedStyle(document.querySelector(".linear")).display);
answers.push([...document.images].every((image) => image.complete && image.naturalWidth > 0));
answers.push(document.documentElement.scrollWidth <= innerWidth);
document.title = JSON.stringify(answers);
</script></body>"""


def browse(page: Path, tmp_path: Path, *options: str) -> tuple[str, str]:
    """The document after its script has run, and what the console says."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command += ["--virtual-time-budget=2000", f"--window-size={WIDTH},{HEIGHT}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_the_page_is_drawn_and_answers(make_run: MakeRun, tmp_path: Path) -> None:
    folders = [make_run("mae"), make_run("um_mae", TINY_UM_MAE)]
    write_metrics(folders[0], [record(step, val_top1=step) for step in range(1, 200)], '{"step": 200, "lo')
    page = write_report(folders, tmp_path / "report.html")

    shot = tmp_path / "shot.png"
    document, console = browse(page, tmp_path, f"--screenshot={shot}")
    assert console == ""
    assert "<svg" in document and document.count("<script") == 1
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    for colour in ((0x1F, 0x6F, 0xEB), (0xD9, 0x73, 0x0D)):  # a line for each run
        assert (np.abs(pixels - colour).max(-1) < 24).sum() > 300
    assert 0.5 < (pixels.min(-1) > 240).mean() < 0.98  # text and pictures on white

    text = page.read_text().replace("</body>", PROBE)
    page.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text))  # it would refuse the probe
    document, console = browse(page, tmp_path)
    assert console == ""
    found = re.search(r"<title>(.*?)</title>", document)
    assert found is not None
    shown, values, linear, drawn, fits = json.loads(unescape(found[1]))
    assert shown == "epoch 1"
    assert re.fullmatch(r"epoch 2[34][.\d]*\nmae: 0\.01\d*", values)  # the other run has ended at epoch 3
    assert (linear, drawn, fits) == ("none", True, True)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_a_script_that_is_not_ours_does_not_run(make_run: MakeRun, tmp_path: Path) -> None:
    page = write_report([make_run()], tmp_path / "report.html", look=False)
    page.write_text(page.read_text().replace("</body>", "<script>document.title = 'mine'</script></body>"))
    document, console = browse(page, tmp_path)
    assert "<title>run: ummim report</title>" in document
    assert "Content Security Policy" in console
