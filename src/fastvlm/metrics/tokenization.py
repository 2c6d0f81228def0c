"""Penn Treebank tokenization of captions, as COCO's caption evaluation does it, without Java.

COCO's scores are defined over the tokens of one tokenizer (Stanford's, version 3.4.1, lower case,
punctuation removed; Chen et al. 2015, arXiv 1504.00325, section 3). A score over other tokens isn't
comparable with a published one, so its behaviour is reproduced here, oddities included: `t.v.`
keeps its last period, `(` becomes a token `-lrb-`, `!!` isn't punctuation.

As in a lexer generator, the longest match wins, what a rule looks ahead at counts as its length,
and the first rule wins a tie.
"""

from __future__ import annotations

import re

# COCO's list, without its brackets: it names them in upper case, so after lower-casing they stay.
_PUNCTUATION = frozenset(["''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", ";"])
_LONGEST_DASH = 4
_LAST_OF_BASIC_PLANE = 0xFFFF

# Letters are what \w has beyond digits, the underscore, and characters that only look like digits.
_LETTER = (
    r"(?:(?![\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209f\u2150-\u218b])[^\W\d_]|[\u0300-\u036f])"
)
_ALNUM = rf"(?:{_LETTER}|\d)"
_CLITIC = rf"'(?i:[smd]|re|ve|ll)(?!{_LETTER})"
# Bounded, lest the "a,a,a,a..." of a captioner gone astray takes time quadratic in its length.
_HYPHENATED = (
    rf"{_ALNUM}(?:{_ALNUM}|[.,]){{0,60}}"
    rf"(?:[-_\u2010\u2011](?:(?:[A-Za-z]\.){{2,}}|{_ALNUM}+))+"
)
_DOTTED = rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)+"
_PART_OF_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"

# The period after these belongs to them, wherever they stand.
_ABBREVIATIONS = (
    # the calendar
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|"
    # places and addresses
    "ala|ariz|calif|colo|conn|dak|fla|ga|ind|kan|kans|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|"
    "tenn|va|vt|wis|wisc|wyo|st|ste|ave|blvd|rd|ct|sq|mt|ft|bldg|ext|"
    # companies and institutions
    "inc|co|cos|corp|pty|ltd|plc|bancorp|dept|bhd|assn|univ|intl|natl|sys|bros|cie|mfg|"
    # people
    "mr|mrs|ms|dr|drs|prof|profs|sen|sens|rep|reps|atty|attys|lt|col|gen|messrs|gov|govs|adm|rev|"
    "maj|sgt|cpl|pvt|capt|pres|lieut|hon|brig|comdr|cmdr|pfc|spc|supt|supts|det|mme|mlle|asst|jr|"
    r"sr|esq|ph\.d|ed\.d|ph|"
    # the rest
    "m|p|v|vs|etc|al|seq|est|cf|tel|cont'd"
)
_CAPITALISED_ABBREVIATIONS = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"  # "miss" is a word
_NUMBERED_ABBREVIATIONS = "art|ca|fig|figs|no|nos|op|pp|prop"  # "no. 5", but "he says no."

# After an initial ("letter B. The sign"), these open a new sentence and the period is its end.
_SENTENCE_OPENERS = (
    "A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|"
    "Many|More|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|"
    "This|We|What|When|While|Yet|You"
)

# Group 1 (the last group that took part) is the token; what a rule matches beyond it is context.
_RULES = tuple(
    re.compile(rule)
    for rule in (
        # Two words written as one: cannot, gonna, 'tis.
        rf"(?i:(can)not|(gon|wan)na|(got)ta|(lem|gim)me|('t)(?:is|was))(?!{_ALNUM})",
        # A word before its clitic: do|n't, she|'ll. The clitics are tokens of their own.
        r"([A-Za-z]*[A-MO-Za-mo-z])(?i:n['`]t)",
        rf"({_ALNUM}+|{_HYPHENATED}){_CLITIC}",
        r"((?i:n['`]t))",
        rf"({_CLITIC})",
        # Apostrophes inside words: ma'am, O'Brien, d'Artagnan, ski'ing, jack-o'lantern.
        r"((?i:c'mon|ma'am|nor'easter|n?e'er|ev'ry|li'l|s'mores|nat'l|ol'))",
        rf"((?:{_ALNUM}+-)*[dloDLO]'{_LETTER}{{2,}}(?:-{_ALNUM}+)*)",
        rf"([A-HJ-XZn]'{_LETTER}{{2,}})",
        rf"({_LETTER}+[aeiouyAEIOUY]'[aeiouA-Z]{_LETTER}*)",
        r"([yYlLdDjJ]')",
        # Apostrophes before words: 'n', 'em, 'til, '80s.
        r"('(?i:n'|n(?![-\w])|em|till?|cause|[2-9]0s|\d\d(?![\w']|[.,:]\d)))",
        # Abbreviations, acronyms and initials keep their periods.
        rf"((?i:{_ABBREVIATIONS})\.|(?:{_CAPITALISED_ABBREVIATIONS})\.)",
        rf"((?i:{_NUMBERED_ABBREVIATIONS})\.)(?=\s*\d)",
        r"((?:[A-Za-z]\.){2,})",
        rf"([A-Za-z]\.)(?!\s*$|\s+(?:{_SENTENCE_OPENERS})(?:\s|$))",
        # So does any word before a comma or colon: "street.," looks like an abbreviation.
        rf"((?:{_ALNUM}+|{_HYPHENATED}|{_DOTTED})\.)[,;:]",
        # Words: plain, hyphenated, with slashes, with a forgotten space ("street.Two"), AT&T.
        rf"({_ALNUM}+)",
        rf"({_HYPHENATED})",
        rf"({_PART_OF_SLASHED}(?:/{_PART_OF_SLASHED}){{1,2}})",
        rf"({_DOTTED})",
        r"([A-Z]+(?:[&+][A-Z]+)+|[cC]\+\+|[cC]#)",
        # Numbers: 1,000 and 12:30 and .5 and -3.
        r"([-+]?(?:\d*(?:[.,:]\d+)+|\d+))",
        # Names on the internet, tags, telephone numbers, emoticons.
        r"(https?://[^\s.]+\.[^\s\"<>|()]*)",
        r"((?:[A-Za-z0-9-]+\.)+(?:com|org|net|edu|gov|uk)/[^\s\"<>|().,;!?]*)",
        rf"(\w[\w.]*@\w+(?:\.\w+)*|@[A-Za-z_]\w*|#{_LETTER}+)",
        r"(</?[A-Za-z][^<>\s]*>)",
        r"(\(\d{3}\) ?\d{3}-\d{4})",
        r"([<>]?[:;=][-o*']?[()DPdpO0\\{@|\[\]](?![A-Za-z])|\^_\^|-_-)",
        # Marks: a run of some is one token, any other stands alone.
        r"([?!]+|-+|\*+|@+|_+|#+|[A-Z]{1,2}\$|''|``|\S)",
    )
)

# The common case, made fast: a word between spaces, for which no rule but the plain word's counts.
_PLAIN = re.compile(r"\s*([A-Za-z]+)([.,]?)(?!\S)")
_NEVER_PLAIN = frozenset(["cannot", "gonna", "wanna", "gotta", "lemme", "gimme"])
_NEVER_PLAIN_BEFORE_PERIOD = frozenset(
    f"{_ABBREVIATIONS}|{_CAPITALISED_ABBREVIATIONS}|{_NUMBERED_ABBREVIATIONS}".lower().split("|")
)

_ENTITIES = (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&"))
_SPELLINGS_OF_MARKS = str.maketrans(
    {
        "\u00ad": "",  # soft hyphen
        "\u2018": "`",
        "\u2019": "'",
        **dict.fromkeys("\u201c\u201d\u00ab\u00bb\u2039\u203a", '"'),
        **dict.fromkeys("\u2012\u2013\u2014\u2015", " -- "),
        "\u2026": " ... ",
        "\u00a3": " # ",
        "\u20ac": " $ ",
        "\u00a2": " cents ",
        "\u00bc": " 1/4 ",
        "\u00bd": " 1/2 ",
        "\u00be": " 3/4 ",
        "\u2153": " 1/3 ",
        "\u2154": " 2/3 ",
    }
)
_SPELLINGS_OF_BRACKETS = str.maketrans(
    {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
)


def tokenize_caption(caption: str) -> list[str]:
    """Split a caption into the lower-case tokens that COCO's caption evaluation counts.

    Each caption is read alone. COCO's tokenizer reads all captions as one text, and whether an
    initial at the end of one ("the letter B.") keeps its period there depends on how the next one
    begins; here it never does.

    Args:
        caption: One caption, any Unicode text; line breaks are white space.

    Returns:
        The tokens without punctuation, none of them empty or with white space in it. An empty list
        for a caption of nothing but punctuation.
    """
    text = caption
    if not text.isascii():
        text = text.translate(_SPELLINGS_OF_MARKS)
    if "&" in text:
        for entity, character in _ENTITIES:
            text = text.replace(entity, character)
    text = text.rstrip()
    tokens: list[str] = []
    position = 0
    while position < len(text):
        plain = _PLAIN.match(text, position)
        if plain is not None and _is_plain(word := plain[1].lower(), plain[2]):
            tokens.append(word)
            position = plain.end()
        elif text[position].isspace():
            position += 1
        else:
            token = _longest_match(text, position)
            position += len(token)
            if not _is_removed(token):
                tokens.extend(token.translate(_SPELLINGS_OF_BRACKETS).lower().split())
    return tokens


def _is_plain(word: str, mark: str) -> bool:
    """Whether a word between spaces is one token, and the mark after it another."""
    if mark == "." and (len(word) == 1 or word in _NEVER_PLAIN_BEFORE_PERIOD):
        return False
    return word not in _NEVER_PLAIN


def _longest_match(text: str, position: int) -> str:
    """The token at a position that isn't white space: that of the rule that matches furthest."""
    token, end = "", position
    for rule in _RULES:
        match = rule.match(text, position)
        if match is not None and match.end() > end:
            token, end = match[match.lastindex or 0], match.end()
    return token


def _is_removed(token: str) -> bool:
    """Whether a token is punctuation to COCO, or a character that the tokenizer drops."""
    if token in _PUNCTUATION:
        return True
    if len(token) == 1:
        # Dropped: emoji and all else outside the basic plane, format and control characters.
        return ord(token) > _LAST_OF_BASIC_PLANE or token == "\ufe0f" or not token.isprintable()
    # A run of dashes is one dash to the tokenizer, unless it's long.
    return len(token) <= _LONGEST_DASH and not token.strip("-")
