"""Render an HTML page as a small PNG, with Chromium."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_browser() -> str:
    """Return the path of a browser. Ends the process with a message if there is none."""
    browser = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if browser is None:
        sys.exit(f"error: none of {', '.join(BROWSERS)} is installed: the pictures need a browser")
    return browser


def screenshot(browser: str, page: Path, picture: Path, width: int, height: int) -> None:
    """Render a page in a window of the given size, in pixels, into a PNG of 64 colors."""
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        flags += ["--hide-scrollbars", "--disable-background-networking"]
        flags += [f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        command = [browser, *flags, f"--screenshot={picture}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(picture) as image:
        image.convert("RGB").quantize(64).save(picture, optimize=True)
