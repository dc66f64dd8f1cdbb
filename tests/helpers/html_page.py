"""Reading HTML pages of minilora's as a browser would."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser


class Page(HTMLParser):
    """What a browser would make of a page: elements with attributes, text and open ancestors."""

    VOID = ("meta", "link", "img", "br", "input", "base")

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[dict] = []
        self.open: list[dict] = []
        self.source = source
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {[element['tag'] for element in self.open]}"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        attributes = {name if name != "class" else "cls": value for name, value in attrs}
        within = [element["tag"] for element in self.open]
        element = {"tag": tag, "text": "", "within": within, **attributes}
        self.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def all(self, tag: str, cls: str | None = None) -> list[dict]:
        found = [element for element in self.elements if element["tag"] == tag]
        if cls is None:
            return found
        return [element for element in found if cls in (element.get("cls") or "").split()]

    def sample_texts(self) -> list[str]:
        """Return prompt, target and answer of all samples."""
        return [e["text"] for e in self.all("div", "text") if "card" not in e["cls"]]

    @property
    def figures(self) -> dict[str, ET.Element]:
        """The charts by their titles."""
        sources = re.findall(r"<figure.*?</figure>", self.source, re.DOTALL)
        found = [ET.fromstring(source) for source in sources]
        return {str(figure.findtext(".//h3")): figure for figure in found}
