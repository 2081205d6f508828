"""Attributes that an answer can show, and the rules that tell whether it does: words of a figure or a hobby, the
language of a text. They are crude, blind to style, and the same for every model that is compared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from megallama.data.record_files import Origin, convert, read_rows
from megallama.rlhf.ghost.constraints import KINDS, Instruction

STOPWORDS = {
    language: frozenset(words.split())
    for language, words in {
        "English": "the and is are was you of to that it with for this have not my i",
        "French": "le la les des est et un une je vous que dans pour pas avec sur mon ce il nous",
        "German": "der die das und ist ich nicht ein eine mit auf zu den für sie es wir von dem auch",
        "Spanish": "el los las es y un una que en para con no por mi se lo su muy más como",
        "Italian": "il gli è e di che un una per con non sono mi ma come più del della anche questo",
        "Portuguese": "o os as é e um uma que em para com não por meu eu mais do da você muito",
        "Dutch": "de het een en is ik niet van met op voor dat je te zijn maar ook mijn we naar",
    }.items()
}
"""Language -> frequent words that tell it from the others."""

SCRIPTS = {
    "Russian": r"[Ѐ-ӿ]",
    "Greek": r"[Ͱ-Ͽ]",
    "Arabic": r"[؀-ۿ]",
    "Hebrew": r"[֐-׿]",
    "Hindi": r"[ऀ-ॿ]",
    "Korean": r"[가-힯]",
    "Japanese": r"[぀-ヿ]",
    "Chinese": r"[一-鿿]",
}
"""Language -> letters that tell it from the others here."""
LETTERS_SHARE = {"Japanese": 0.2}
"""Of the letters that must be a language's own, where that is not half of them: Japanese has Chinese ones too."""

WORDS = {
    ("figure", "Napoleon"): "emperor|france|french|waterloo|austerlitz|josephine|elba|my (?:army|troops|soldiers)",
    ("figure", "Oscar Wilde"): "wilde|dorian|dandy|epigram|wit|beauty|aesthet|my dear|temptation",
    ("figure", "Albert Einstein"): "relativity|physics|photon|light|universe|imagination|gravity|princeton",
    ("figure", "Cleopatra"): "egypt|nile|pharaoh|queen|alexandria|caesar|antony",
    ("figure", "Shakespeare"): "thou|thee|thy|hath|doth|sonnet|globe|stage|bard|verily",
    ("figure", "Marie Curie"): "radium|polonium|radioactiv|laboratory|pierre|sorbonne|poland|warsaw",
    ("hobby", "tennis"): "tennis|racket|racquet|serve|wimbledon|volley|court",
    ("hobby", "chess"): "chess|pawn|knight|checkmate|opening|board|bishop|grandmaster",
    ("hobby", "gardening"): "garden|plant|flower|soil|seed|weed|compost|grow",
    ("hobby", "cooking"): "cook|recipe|kitchen|dish|ingredient|flavou?r|bake|spice",
    ("hobby", "photography"): "photo|camera|lens|picture|exposure|shutter|light",
    ("hobby", "hiking"): "hik(?:e|ing)|trail|mountain|boots|summit|walk|path",
}
"""(kind, name) -> what an answer says that shows it."""


class Attribute(NamedTuple):
    """What an answer is to show; `pattern` (a regular expression, capitals do not count) decides where it is given."""

    kind: str
    name: str
    pattern: str | None = None

    def instruction(self) -> str:
        return Instruction(((self.kind, self.name),)).full()

    def kept(self, text: str) -> bool:
        """Whether an answer shows it."""
        if self.pattern is not None:
            return re.search(self.pattern, text, re.IGNORECASE) is not None
        return is_written_in(self.name, text)


def is_written_in(language: str, text: str) -> bool:
    """Whether a text is in a language of STOPWORDS, by having more of its words than of any other's, or of SCRIPTS, by
    its letters."""
    if language in SCRIPTS:
        letters = [c for c in text if c.isalpha()]
        own = sum(re.match(SCRIPTS[language], c) is not None for c in letters)
        if language == "Chinese" and is_written_in("Japanese", text):
            return False
        return 0 < own >= LETTERS_SHARE.get(language, 0.5) * len(letters)
    words = re.findall(r"[^\W\d_]+", text.lower())
    counts = {name: sum(word in known for word in words) for name, known in STOPWORDS.items()}
    mine = counts.pop(language)
    return mine > max(counts.values())


def known_attributes() -> list[Attribute]:
    """All that have a rule, the kinds in turn."""
    figures, hobbies = (
        [Attribute(kind, name, rf"\b(?:{words})") for (kind, name), words in WORDS.items() if kind == wanted]
        for wanted in ("figure", "hobby")
    )
    languages = [Attribute("language", name) for name in (*STOPWORDS, *SCRIPTS) if name != "English"]
    return [one for three in zip(figures, languages, hobbies, strict=False) for one in three]


def read_attributes(path: Path) -> list[Attribute]:
    """The attributes of a file of records {"kind", "name", "pattern"}; those with a rule of their own need no pattern.

    Raises:
        ValueError: an unknown kind, a name without a rule, or a pattern that is none; names file and line.
    """
    return convert(read_rows(path), _attribute)


def _attribute(record: dict, origin: Origin) -> Attribute:
    kind, name, pattern = (record.get(field) for field in ("kind", "name", "pattern"))
    if kind not in KINDS:
        raise ValueError(f"field 'kind': unknown attribute {kind!r}; known are {', '.join(KINDS)}")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"field 'name' is {name!r}; name the {kind}")
    if pattern is not None:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"field 'pattern' is {pattern!r}, no regular expression ({error})") from None
        return Attribute(kind, name, pattern)
    if kind == "language":
        if name in STOPWORDS or name in SCRIPTS:
            return Attribute(kind, name)
        known = ", ".join((*STOPWORDS, *SCRIPTS))
    else:
        if (kind, name) in WORDS:
            return Attribute(kind, name, rf"\b(?:{WORDS[kind, name]})")
        known = ", ".join(known for other, known in WORDS if other == kind)
    raise ValueError(
        f"field 'name': no rule tells whether an answer shows the {kind} {name!r}; add a field 'pattern', a regular "
        f"expression of what shows it, or name one of {known}"
    )
