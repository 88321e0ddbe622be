"""New words: they get ids of their own behind the vocabulary, and never an old word's."""

import pytest

from mep_lightning.bases.tokens import expand, token_ids, with_tokens
from mep_lightning.errors import UserError


def test_several_vectors_are_as_many_words(tiny_base):
    counts = {"<sks>": 3}
    known = tiny_base.tokenizers[0]
    assert expand("a <sks> ball", counts) == "a <sks> <sks>_1 <sks>_2 ball"
    ids = token_ids(with_tokens(known, counts), [expand("a <sks> ball", counts)])[0].tolist()
    first = len(known)
    assert ids[2:5] == [first, first + 1, first + 2]
    assert ids[1] == token_ids(known, ["a ball"])[0, 1] and ids[5] == token_ids(known, ["a ball"])[0, 2]
    assert "<sks>" not in known.get_vocab()


@pytest.mark.parametrize("word", ["ball", "Ball"])
def test_a_token_that_is_already_a_word_is_refused(tiny_base, word):
    with pytest.raises(UserError, match="already a word"):
        with_tokens(tiny_base.tokenizers[0], {word: 1})
