"""WordNet's nouns (Princeton WordNet 3.0, `data.noun`) as a graph of categories with pages.

    Things -> domain -> synset -> ... -> synset

The root is "Things". Below it are the 25 domains into which lexicographers sorted the nouns (act,
animal, artifact, ...), and below a domain its synsets by their hypernyms. A synset that others are
kinds of is a category. Every synset with a gloss is a page: its title is the first of its words,
its abstract the gloss without the example sentences, its categories are its hypernyms.

Only hypernyms of the same domain count, so that the domains are apart from each other: what is
asked about one domain cannot be learnt in another. Instances (Einstein, Paris) are left out.
"""

from dataclasses import dataclass
from pathlib import Path

import networkx

from minilora.errors import UserError, require
from minilora.evaluation.category_graph import DiGraph

ROOT = "Things"

DOMAINS = (
    "Tops act animal artifact attribute body cognition communication event feeling food group "
    "location motive object person phenomenon plant possession process quantity relation shape "
    "state substance time"
).split()
"""The names of the lexicographer files of nouns, which have the numbers 3 to 28."""
FIRST_DOMAIN = 3
NO_DOMAIN = "Tops"
"""The file of the synsets above all domains."""

MIN_GLOSS_CHARACTERS = 25
"""A synset with a shorter gloss is not a page: too little to tell what it is about."""


@dataclass(frozen=True)
class Synset:
    """A set of words with one meaning."""

    name: str
    """The first of its words."""
    domain: str
    gloss: str
    """What it means, without example sentences."""
    hypernyms: tuple[str, ...]
    """Keys of the synsets that this one is a kind of."""
    is_instance: bool
    """Whether it is one thing with a name, not a kind of thing."""


def read_synsets(path: Path) -> dict[str, Synset]:
    """Read a `data.noun` file: {key: synset}.

    Raises:
        UserError: there is no such file, or a line of it is something else.
    """
    require(
        path.is_file(),
        f"WordNet is not installed: there is no {path}. Install it (apt install wordnet-base), or "
        "name its file of nouns: --wordnet DIRECTORY/data.noun",
    )
    synsets = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if line.startswith("  "):  # the licence above the synsets
            continue
        try:
            key, synset = _parse_synset(line)
        except (ValueError, IndexError) as error:
            raise UserError(f"{path}:{number}: not a noun of WordNet's data.noun") from error
        synsets[key] = synset
    return synsets


def _parse_synset(line: str) -> tuple[str, Synset]:
    """Return the key and the synset of a line (WordNet's wndb(5WN) describes it).

    It is "KEY DOMAIN_NUMBER TYPE WORD_COUNT(hex) (WORD LEX_ID)* POINTER_COUNT (SYMBOL KEY PART
    SOURCE_TARGET)* | GLOSS".
    """
    head, _, gloss = line.partition(" | ")
    key, domain, _, num_words, *fields = head.split()
    words_end = 2 * int(num_words, 16)
    pointers_begin = words_end + 1
    num_pointers = int(fields[words_end])
    hypernyms = []
    is_instance = False
    for i in range(num_pointers):
        symbol, target, part_of_speech, _ = fields[pointers_begin + 4 * i :][:4]
        if symbol == "@" and part_of_speech == "n":
            hypernyms.append(target)
        if symbol == "@i":
            is_instance = True
    synset = Synset(
        name=fields[0].replace("_", " "),
        domain=DOMAINS[int(domain) - FIRST_DOMAIN],
        gloss=gloss.split('; "')[0].strip(),
        hypernyms=tuple(hypernyms),
        is_instance=is_instance,
    )
    return key, synset


def wordnet_graph(path: Path) -> DiGraph:
    """Make the graph of a `data.noun` file.

    Returns:
        A graph with the attribute "root"; nodes have a "title" and "pages", each of
        which has "id", "title" and "abstract". A page is in the pages of each of its categories.
    """
    graph = networkx.DiGraph(root=ROOT)
    graph.add_node(ROOT, title=ROOT, pages=[])
    for domain in DOMAINS:
        if domain != NO_DOMAIN:
            graph.add_node(domain, title=domain, pages=[])
            graph.add_edge(ROOT, domain)

    synsets = {key: synset for key, synset in read_synsets(path).items() if _is_kind(synset)}
    for key, synset in synsets.items():
        hypernyms = [hypernym for hypernym in synset.hypernyms if hypernym in synsets]
        in_domain = [h for h in hypernyms if synsets[h].domain == synset.domain]
        categories = in_domain or [synset.domain]
        graph.add_node(key, title=synset.name)
        graph.nodes[key].setdefault("pages", [])
        for category in categories:
            graph.add_edge(category, key)
            if len(synset.gloss) >= MIN_GLOSS_CHARACTERS:
                graph.nodes[category].setdefault("pages", []).append(_page(key, synset))

    leaves = [node for node in graph if graph.out_degree(node) == 0]
    graph.remove_nodes_from(leaves)  # nothing is below them: they are pages, but no categories
    return graph


def _is_kind(synset: Synset) -> bool:
    """Return whether a synset is a kind of thing in one of the domains."""
    return synset.domain != NO_DOMAIN and not synset.is_instance


def _page(key: str, synset: Synset) -> dict[str, str]:
    """Return the page of a synset; its abstract is the gloss as a sentence."""
    abstract = synset.gloss[0].upper() + synset.gloss[1:] + "."
    return {"id": key, "title": synset.name, "abstract": abstract}
