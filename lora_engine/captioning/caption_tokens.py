"""Captions -> the tokens that scores compare, as in the COCO caption evaluation.

That evaluation runs Stanford's PTBTokenizer (CoreNLP 3.4.1, `-lowerCase`), a Java program, and
drops most punctuation. This file has the tokenizer's rules that matter for captions. The tokens
equal the program's on all of 300 captions of Conceptual Captions and 165 others of photographs, and
on 275 of 296 lines of difficult cases. Known differences: a single letter that ends a sentence
inside a caption ("vitamin c. a"), telephone numbers with brackets, HTML entities, "c++", and curly
apostrophes inside some words.
"""

import re
from functools import lru_cache

# The tokenizer also rewrites: currencies and fractions are spelled out, dashes and dots unified,
# soft hyphens removed. Here every curly apostrophe becomes a straight one; the program keeps it in
# the few words that it knows as a whole (o’clock, ’em, ’90s).
_REWRITTEN = str.maketrans({
    "’": "'", "´": "'", "‘": "`", "‛": "`", "‹": "`", "›": "`",
    "“": '"', "”": '"', "«": '"', "»": '"',
    "…": " ... ", "–": " -- ", "—": " -- ", "―": " -- ",
    "£": " # ", "€": " $ ", "¤": " $ ", "¢": " cents ",
    "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 ",
    "\u00ad": "",
    **{digit: f" {digit} " for digit in "⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉"},
})
_BRACKETS = str.maketrans({
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
})
# The evaluation's list of punctuation, except for its brackets: it has them in upper case, while
# the tokens are in lower case. So "-lrb-" and "-rrb-" stay tokens there, and here.
_DROPPED = re.compile(r"""'{1,2}|`{1,2}|"|\.+|-{1,4}|[?!,:; ]""")

# Abbreviations, whose period is theirs.
_ABBREVIATIONS = """
    a.k.a adj adm adv al ala alex apr ariz assn assoc asst attys? aug ave bancorp bhd bldg blvd brig
    bros calif capt cf cie cmdr col colo comdr conn corp cos? cpl ct dak dec dept det drs? ed\\.d
    elec ens esq est etc ext feb fla fri ft ga gen govs? hon inc ind insp intl invt jan jos jr jul
    jun kans? ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mrs? ms msgr mt
    mtg natl neb nev nov oct okla penn pfc ph\\.d ph plc pp?t[ye]s? pres profs? pvt rd reps? rev rt
    sens? sept? seq sfc sgt spc sq sr ste? supts? sys tel tenn thurs? thu treas tues? univ va vs vt
    wed wisc? wm wyo
""".split()
_CAPITALISED_ABBREVIATIONS = "A[zrk] Del Ill La Mass Miss Ore Pa Tex Wash".split()
_NUMBERED = r"(?:ca|figs?|prop|nos?|art|pp|op)\."  # abbreviations before a number only

_LETTER = r"(?:[^\W\d_][\u0300-\u036f]*)"
_ALNUM = r"(?:[^\W_][\u0300-\u036f]*)"
_WORD = rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)*"
_NUMBER = r"(?:\d*(?:[.:,]\d+)+|\d+)"
_INITIALS = r"[a-z](?:\.[a-z])+"
_CLITIC = "'(?:[msd]|re|ve|ll)"
_LINK_END = r"""[^"'<>|()]*[^]"'<>|.!?(){},;:-]"""


def _rule(token: str, before: str = "") -> re.Pattern[str]:
    return re.compile(f"({token})(?:{before})", re.IGNORECASE)


# At each position the longest match wins, including what must follow the token; of equal ones the
# first.
_RULES = [
    _rule("can", before="not"),
    _rule("gon|wan", before="na"),
    _rule("got", before="ta"),
    _rule("gim|lem", before="me"),
    _rule("'t", before="is|was"),
    _rule(r"</?[a-z][\w.:-]*/?>"),  # <person>
    _rule(_WORD, before=_CLITIC),
    _rule(r"[^\W\d_]*[a-mo-z]", before="n['`]t"),  # do|n't
    _rule(_WORD),  # also "u.s.a" and "end.start"
    _rule(rf"""
        'n(?:'|(?!{_LETTER}))|[ldj]'|(?:dunkin|somethin|ol)'|'(?:em|cause|till?|[2-9]0s)
        |(?-i:[A-HJ-XZn]'){_LETTER}{{2,}}|{_LETTER}+[aeiouy]'(?-i:[aeiouA-Z]){_LETTER}*
        |cont'd\.?|nor'easter|c'mon|c'est|cap'n|e'er|s'mores|ev'ry|li'l|nat'l
    """.replace("\n", "").replace(" ", "")),
    _rule("y'", before=_LETTER),
    _rule(rf"(?:https?://|www\.|(?:[a-z]+\.)+(?:com|net|org|edu)/){_LINK_END}"),
    _rule(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    _rule(rf"@[a-z_]\w*|\#{_LETTER}+"),
    _rule(_CLITIC, before="(?![a-z])"),
    _rule("n't", before="(?![a-z])"),
    _rule(r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}"),
    _rule(f"[-+]?{_NUMBER}"),
    _rule(r"\d{1,4}/\d{1,4}|\d{1,4}-\d{1,4}/\d{1,4}"),
    _rule("pro-|anti-"),
    _rule("[a-z0-9]+(?:-[a-z]+){0,2}(?:/[a-z0-9]+(?:-[a-z]+){0,2}){1,2}"),  # red/white/dark-blue
    _rule(r"(?-i:[A-Z]+)\$"),
    _rule(_NUMBERED, before=r"\s?\d"),
    _rule(rf"(?:{'|'.join(_ABBREVIATIONS)}|{_INITIALS}|[a-z])\."),
    _rule(rf"(?-i:{'|'.join(_CAPITALISED_ABBREVIATIONS)})\."),
    _rule(r"'\d\d", before="$"),  # '84
    _rule(rf"{_WORD}\.", before="[,;:]"),
    _rule(r"<?[:;=][-o*']?[()DPO\\{@|\[\]]", before="[^a-z0-9]|$"),  # :-)
    _rule(r"-+|\.\.\.+|@+|\#+|_+|\*+|[?!]+|<<|>>"),
    _rule(rf"{_ALNUM}(?:{_ALNUM}|[.,])*(?:-(?:{_ALNUM}+|{_INITIALS}\.))+"),  # 2,000-pound, u.s.-led
    _rule(rf"""
        (?:[dol]'(?={_ALNUM}))?(?:{_ALNUM}+|[-+]?{_NUMBER})
        (?:[-_\u2010\u2011](?:[dol]'(?={_ALNUM}))?(?:{_ALNUM}+|{_NUMBER}))*
    """.replace("\n", "").replace(" ", "")),
    _rule(r"(?-i:[A-Z]+(?:[+&][A-Z]+)+)"),
    _rule("."),
]
# The program skips what it has no rule for: everything beyond the basic plane, such as most emoji.
_PIECE = re.compile(
    rf"(?:\b{_NUMBERED} (?=\d))?"
    r"[^\s\U00010000-\U0010ffff\u200b-\u200f\u20a0-\u20cf\ue000-\uf8ff\ufe00-\ufe0f\ufeff]+",
    re.IGNORECASE,
)


# A letter or digit of the basic plane is always part of a token.
_SURELY_A_WORD = re.compile(r"(?![_\U00010000-\U0010ffff])\w")


def has_words(caption: str) -> bool:
    """Whether a caption has any token that scores can compare."""
    return _SURELY_A_WORD.search(caption) is not None or bool(tokenize(caption))


def tokenize(caption: str) -> list[str]:
    """A caption's tokens, in lower case, without punctuation."""
    text = caption.translate(_REWRITTEN)
    return [token for piece in _PIECE.findall(text) for token in _tokens(piece)]


@lru_cache(maxsize=2**16)
def _tokens(piece: str) -> tuple[str, ...]:
    found = []
    at = 0
    while at < len(piece):
        matches = filter(None, (rule.match(piece, at) for rule in _RULES))
        match = max(matches, key=lambda match: match.end())
        at = match.end(1)
        if not _DROPPED.fullmatch(match[1]):
            found.append(match[1].lower().translate(_BRACKETS))
    return tuple(found)
