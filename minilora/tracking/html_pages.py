"""HTML pages that load nothing else: their templates, and what may stand in them."""

import base64
import hashlib
import json
import re
from pathlib import Path

import jinja2

from minilora.tracking.charts import is_finite

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that HTML or UTF-8 cannot represent."""


def render_page(template: jinja2.Template, **values: object) -> str:
    """Fill a template, and replace the characters that a page cannot hold."""
    return UNPRINTABLE.sub(_printable, template.render(**values))


def load_template(name: str, **constants: object) -> jinja2.Template:
    """Compile a template of this folder. Every value that it shows is escaped.

    Args:
        name: of the file.
        constants: names that the template and those that it imports can use.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = _sha256_base64
    environment.globals["format_number"] = format_number
    environment.globals["to_json"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals.update(constants)
    return environment.get_template(name)


def format_number(value: float) -> str:
    """Format a number for a reader: five digits, or whole thousands with commas."""
    if not is_finite(value):
        return str(value)
    if 1e4 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.5g}"


def _sha256_base64(text: str) -> str:
    """Hash a script for the page's Content-Security-Policy."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _printable(match: re.Match) -> str:
    """Return a character to show in place of an unprintable one."""
    char = match[0]
    if char < " ":
        return chr(0x2400 + ord(char))  # Unicode's pictures of control characters
    return "\ufffd"
