"""Tokens of captions: each expectation is what Stanford's tokenizer 3.4.1 makes of the text."""

import pytest

from fastvlm.metrics.tokenization import tokenize_caption


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man, a dog; and 'a' \"cat\".", "a man a dog and a cat"),
        ("Lots   of\tspace\nhere ", "lots of space here"),
        ("", ""),
        (" ... -- ?! ", "?!"),
        ("Hi! Hi!! what?", "hi hi !! what"),
        ("it's he'll I'M they\u2019re dogs' boys'.", "it 's he 'll i 'm they 're dogs boys"),
        ("don't can't won't cannot ain\u2019t", "do n't ca n't wo n't can not ai n't"),
        ("shouldn't've gonna wanna 'tis gottas", "should n't 've gon na wan na 't is gottas"),
        ("would'nt", "would nt"),
        ("ma'am o'clock ski'ing hors d'oeuvres", "ma'am o'clock ski'ing hors d'oeuvres"),
        (
            "jack-o'lantern rock'n'roll 'til '80s 80's",
            "jack-o'lantern rock 'n' roll 'til '80s 80 's",
        ),
        ("ice-cream, t-shirts 5-year-old half -eaten", "ice-cream t-shirts 5-year-old half eaten"),
        ("a--b a\u2014b a - b", "a b a b a b"),
        ("red/white and/or w/ 1/2", "red/white and/or w / 1/2"),
        ("1,000 at 10:30am for $5.00, 2nd", "1,000 at 10:30 am for $ 5.00 2nd"),
        ("50% of #8 & M&M's", "50 % of # 8 & m&m 's"),
        ("St. Mr. Smith vs. etc.", "st. mr. smith vs. etc."),
        ("watching t.v. in the U.S.", "watching t.v. in the u.s."),
        ("miss. Miss. no. No. 5", "miss miss. no no. 5"),
        ("the letter B. The sign", "the letter b the sign"),
        ("John F. Kennedy", "john f. kennedy"),
        ("a street., a street,", "a street. a street"),
        ("on the street.Two men", "on the street.two men"),
        ("(a) [b] :)", "-lrb- a -rrb- -lsb- b -rsb- :-rrb-"),
        ("A&amp;M", "a&m"),
        ("caf\u00e9 El Ni\u00f1o 2\u00bd\u00ac \U0001f600", "caf\u00e9 el ni\u00f1o 2 1/2 \u00ac"),
    ],
)
def test_tokens(caption: str, tokens: str) -> None:
    assert tokenize_caption(caption) == tokens.split()


def test_an_initial_at_the_end_loses_its_period() -> None:
    # As it does in COCO's evaluation before a caption that begins with "A" or "The".
    assert tokenize_caption("This is the letter B.") == ["this", "is", "the", "letter", "b"]


def test_common_words_take_no_other_path_than_rare_ones() -> None:
    # A mark glued to a word keeps it from the fast path; removing the mark's token shows the rest.
    for word in ["A", "dog", "Cannot", "gonna", "st", "miss", "no", "b", "tv", "Standing", "x"]:
        assert tokenize_caption(f"{word} |")[:-1] == tokenize_caption(word)
        assert tokenize_caption(f"{word}|")[:-1] == tokenize_caption(word)
