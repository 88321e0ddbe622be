"""Prompts to embeddings: the trained vectors stand where their token stands, and nowhere else."""

import pytest
import torch

from mep_lightning.bases.conditioning import encode_prompts
from mep_lightning.bases.tokens import expand, token_ids, with_tokens
from mep_lightning.errors import UserError

PROMPTS = ["a photo of a <sks> ball on grass", "a red <sks> ball"]


def by_hand(base, ids, vectors, first):
    """The text encoder's own forward with the table enlarged, the way Textual Inversion is usually done."""
    import copy

    encoder = copy.deepcopy(base.text_encoders[0])
    table = encoder.get_input_embeddings()
    enlarged = torch.nn.Embedding(table.num_embeddings + len(vectors), table.embedding_dim)
    enlarged.weight.data = torch.cat([table.weight.data, vectors])
    assert table.num_embeddings == first
    encoder.set_input_embeddings(enlarged)
    return encoder(ids).last_hidden_state


@pytest.mark.parametrize("count", [1, 3])
def test_equals_an_enlarged_embedding_table(tiny_base, count):
    vectors = torch.randn(count, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    tokenizer = with_tokens(tiny_base.tokenizers[0], {"<sks>": count})
    ids = token_ids(tokenizer, [expand(p, {"<sks>": count}) for p in PROMPTS])
    first = tiny_base.text_encoders[0].get_input_embeddings().num_embeddings
    assert (ids >= first).sum() == 2 * count
    with torch.no_grad():
        ours = encode_prompts(tiny_base, PROMPTS, {"<sks>": vectors})
        torch.testing.assert_close(ours, by_hand(tiny_base, ids, vectors, first))


def test_members_are_independent(tiny_base):
    members = torch.randn(3, 1, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    with torch.no_grad():
        together = encode_prompts(tiny_base, PROMPTS, {"<sks>": members})
        each = torch.cat([encode_prompts(tiny_base, PROMPTS, {"<sks>": m}) for m in members])
    assert together.shape == (6, 32, 128)
    torch.testing.assert_close(together, each)


def test_prompts_without_the_token_do_not_change(tiny_base):
    with torch.no_grad():
        plain = encode_prompts(tiny_base, ["a red ball"])
        beside = encode_prompts(tiny_base, ["a red ball", "a <sks> ball"], {"<sks>": torch.ones(1, 128)})
    torch.testing.assert_close(beside[:1], plain)
    assert not torch.allclose(beside[1], plain[0])


def test_the_table_and_the_tokenizer_stay_as_they_were(tiny_base):
    table = tiny_base.text_encoders[0].get_input_embeddings().weight.clone()
    size = len(tiny_base.tokenizers[0])
    encode_prompts(tiny_base, PROMPTS, {"<sks>": torch.ones(2, 128)})
    assert torch.equal(table, tiny_base.text_encoders[0].get_input_embeddings().weight)
    assert len(tiny_base.tokenizers[0]) == size
    assert not tiny_base.text_encoders[0].get_input_embeddings()._forward_hooks


def test_gradients_reach_the_vectors_alone(tiny_base):
    vectors = torch.zeros(1, 128, requires_grad=True)
    encode_prompts(tiny_base, PROMPTS, {"<sks>": vectors}).square().sum().backward()
    assert vectors.grad.abs().sum() > 0
    assert all(p.grad is None for p in tiny_base.text_encoders[0].parameters())


def test_several_tokens_in_one_prompt(tiny_base):
    one, two = torch.randn(2, 1, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a = encode_prompts(tiny_base, ["a <a> and a <b>"], {"<a>": one, "<b>": two})
        b = encode_prompts(tiny_base, ["a <a> and a <b>"], {"<a>": two, "<b>": one})
        c = encode_prompts(tiny_base, ["a <b> and a <a>"], {"<a>": two, "<b>": one})
    assert not torch.allclose(a, b)
    torch.testing.assert_close(a, c)


def test_a_padded_table_does_not_hide_the_vectors(tiny_base):
    import copy

    base = copy.copy(tiny_base)
    encoder = copy.deepcopy(base.text_encoders[0])
    table = encoder.get_input_embeddings()
    padded = torch.nn.Embedding(table.num_embeddings + 46, table.embedding_dim)
    padded.weight.data[: table.num_embeddings] = table.weight.data
    encoder.set_input_embeddings(padded)
    base.text_encoders = [encoder]
    vectors = torch.randn(1, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    with torch.no_grad():
        torch.testing.assert_close(
            encode_prompts(base, PROMPTS, {"<sks>": vectors}), encode_prompts(tiny_base, PROMPTS, {"<sks>": vectors})
        )


def test_a_token_that_is_cut_off_is_refused(tiny_base):
    long = "a photo of a ball on grass and " * 5 + "a <sks> ball"
    with pytest.raises(UserError, match="longer than the 32 tokens"):
        encode_prompts(tiny_base, [long], {"<sks>": torch.zeros(1, 128)})
    with pytest.raises(UserError, match="with its 40 trained vectors"):
        encode_prompts(tiny_base, ["a <sks> ball"], {"<sks>": torch.zeros(40, 128)})
