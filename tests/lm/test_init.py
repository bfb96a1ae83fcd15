"""Each start against its formula in loops and float64, over both kinds of tokenizer.

`pair` is a source tokenizer with a target: byte-level to proteins, proteins to byte-level (most
target tokens cannot be written), and byte-level to itself (nearly every token is itself).
"""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from entmax import sparsemax
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig

from s2t2_dist import artifacts
from s2t2_dist.data.shards import ShardReader
from s2t2_dist.errors import ConfigError, DataError
from s2t2_dist.lm import auxiliary
from s2t2_dist.lm.fold import fold
from s2t2_dist.lm.folder import WeightFiles
from s2t2_dist.lm.init import (
    Gaussian,
    by_similarity,
    sparse_weights,
    starting_rows,
    warm_start,
)
from s2t2_dist.lm.result import special_ids
from s2t2_dist.lm.subtokens import sub_tokens
from s2t2_dist.ot import Translator, make_solver
from tests.conftest import CONTEXT, make_source_model

WIDTH = 5
ROWS = 400  # of the embedding; the protein tokenizer has 64 tokens, the others are padding
# float32 sums of at most 400 terms of size 1.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def protein_model(protein_tokenizer, tmp_path_factory):
    """A base model with the protein tokenizer; most rows of its embedding belong to no token."""
    return make_source_model(tmp_path_factory.mktemp("protein-model") / "m", protein_tokenizer)


@pytest.fixture(params=["bytes to proteins", "proteins to bytes", "bytes to bytes"])
def pair(request, source_model, protein_model, source_data, protein_data):
    model, data = {
        "bytes to proteins": (source_model, protein_data),
        "proteins to bytes": (protein_model, source_data),
        "bytes to bytes": (source_model, source_data),
    }[request.param]
    return Pair(model, ShardReader(data, "train"))


class Pair:
    def __init__(self, model, data):
        self.model, self.data = model, data
        self.source = AutoTokenizer.from_pretrained(model)
        self.target = AutoTokenizer.from_pretrained(data.directory / "tokenizer")
        self.U = data.metadata["vocab_size"]
        self.weights = WeightFiles(model)

    def start(self, init, seed=17, **keys):
        return starting_rows(init, self.weights, self.data, seed, **keys)

    def pieces(self, number, characters=False):
        """Source ids of a target token, by the public interface of transformers alone."""
        if number in self.target.all_special_ids:
            return []
        text, token = self.target.decode([number]), self.target.convert_ids_to_tokens(number)
        if "\ufffd" in text:  # bytes that are no character
            ids = [self.source.get_vocab().get(character) for character in token]
            return [] if None in ids else ids
        ids = []
        for part in text if characters else [text]:
            ids += self.source.encode(part, add_special_tokens=False)
        return [i for i in ids if i != self.source.unk_token_id]


def random_weight(seed, rows=ROWS):
    return torch.randn(rows, WIDTH, generator=torch.manual_seed(seed), dtype=torch.float64)


def mean_of_tokens(weight, tokenizer):
    total = torch.zeros(WIDTH, dtype=torch.float64)
    for i in tokenizer.get_vocab().values():
        total += weight[i]
    return total / len(tokenizer.get_vocab())


def special_match(pair, number):
    """The source's token of the same role, which both kinds of tokenizer have for two of them."""
    for role in ("eos_token_id", "pad_token_id", "unk_token_id"):
        if getattr(pair.target, role) == number:
            return getattr(pair.source, role)
    return None


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mean(pair, seed):
    weight = random_weight(seed)
    new = pair.start("mean")(weight.float())
    assert new.shape == (pair.U, WIDTH) and new.dtype == torch.float32
    expected = mean_of_tokens(weight, pair.source)
    for row in new:
        torch.testing.assert_close(row.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("characters", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mean_of_sub_tokens_and_of_characters(pair, seed, characters):
    weight = random_weight(seed)
    start = pair.start("character_mean" if characters else "subtoken_mean")
    new, mean = start(weight.float()), mean_of_tokens(weight, pair.source)
    written = 0
    for number in range(pair.U):
        ids = pair.pieces(number, characters)
        if not ids and special_match(pair, number) is not None:
            ids = [special_match(pair, number)]
        expected = torch.zeros(WIDTH, dtype=torch.float64)
        for i in ids:
            expected += weight[i] / len(ids)
        written += bool(ids)
        torch.testing.assert_close(new[number].double(), expected if ids else mean, **TOLERANCE)
    assert start.record == {"of source tokens": written, "mean of all": pair.U - written}
    assert written > 20


def test_a_vocabulary_becomes_itself(source_model, source_data):
    """Every token of a BPE is written as itself, the bytes that are no character too."""
    pair = Pair(source_model, ShardReader(source_data, "train"))
    weight = random_weight(0, pair.U).float()
    for init in ("subtoken_mean", "focus"):
        torch.testing.assert_close(pair.start(init)(weight), weight, rtol=0, atol=0)
    differing = (pair.start("character_mean")(weight) != weight).any(1)
    assert 0 < differing.sum() < pair.U


def test_pieces_and_characters_differ_where_the_source_has_longer_tokens(source_model):
    """The text `in` is one token of English, two characters."""
    ids = AutoTokenizer.from_pretrained(source_model).get_vocab()
    assert sub_tokens(source_model, [b"in", b""], 400) == [[ids["in"]], []]
    assert sub_tokens(source_model, [b"in"], 400, True) == [[ids["i"], ids["n"]]]
    assert sub_tokens(source_model, [b"in"], ids["in"]) == [[]]  # an id without a row


def prefixing(kind):
    """A tokenizer that puts a space before a text, in each of the ways that there are."""
    space = "\u0120" if kind == "byte-level" else "\u2581"
    tokens = ["<unk>", space, "a", "b", "ab", f"{space}a", f"{space}ab"]
    merges = [("a", "b"), (space, "ab"), (space, "a")]
    model = models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    if kind == "byte-level":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.ByteLevel(add_prefix_space=True)]
        )
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(space), normalizers.Replace(" ", space)]
        )
    return tokenizer, {t.replace(space, "_"): i for i, t in enumerate(tokens)}


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "prepend"])
def test_no_space_is_put_before_a_text(tmp_path, kind):
    tokenizer, ids = prefixing(kind)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizer.encode("ab").ids == [ids["_ab"]]  # which is what this is about
    found = sub_tokens(tmp_path, [b"ab", b" ab", b"bab", b"axb"], 7)
    assert found == [[ids["ab"]], [ids["_ab"]], [ids["b"], ids["ab"]], [ids["a"], ids["b"]]]


def test_bytes_of_sentencepiece_write_what_is_no_character(tmp_path):
    vocabulary = {token: i for i, token in enumerate(["a", "<0xC3>", "<0xA9>", "\u00c3"])}
    Tokenizer(models.BPE(vocabulary, [], byte_fallback=True)).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    texts = [b"\xc3", b"\xc3\xa9", b"\xff", b"\xa9\xc3"]
    assert sub_tokens(tmp_path, texts, 4) == [[1], [1, 2], [], [2, 1]]


def test_a_gaussian_is_a_linear_map_whose_rows_sum_to_one(pair):
    """E, L and the bias get the same one; rows that belong to no token have no part in it."""
    start = pair.start("gaussian")
    weights_UV = start(torch.eye(ROWS)).double()
    torch.testing.assert_close(weights_UV.sum(1), torch.ones(pair.U).double(), rtol=0, atol=1e-5)
    unused = sorted(set(range(ROWS)) - set(pair.source.get_vocab().values()))
    assert len(unused) == ROWS - len(pair.source) and not weights_UV[:, unused].any()
    for seed in range(3):
        weight = random_weight(seed)
        new = start(weight.float()).double()
        for row in range(0, pair.U, 9):
            expected = sum(share * old for share, old in zip(weights_UV[row], weight, strict=True))
            torch.testing.assert_close(new[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_gaussian_has_the_mean_and_the_covariance_of_the_rows(seed):
    """Of 40,000 draws: standard errors are 0.5% and 0.7% of the scale; bounds are 5 of them."""
    rows, count = 60, 40_000
    both = random_weight(seed, rows) @ random_weight(9, WIDTH)  # E beside L: they are correlated
    both = torch.cat((both, both[:, :2] + random_weight(seed + 50, rows)[:, :2]), 1)
    start = Gaussian(count, torch.arange(rows), seed)
    drawn = torch.cat((start(both[:, :WIDTH].float()), start(both[:, WIDTH:].float())), 1).double()
    mean = both.sum(0) / rows
    covariance = sum(torch.outer(row - mean, row - mean) for row in both) / rows
    scale = covariance.diagonal().sqrt()
    assert ((drawn.mean(0) - mean).abs() < 5 * scale / math.sqrt(count)).all()
    error = (torch.cov(drawn.T, correction=0) - covariance).abs()
    assert (error < 5 * math.sqrt(2 / count) * torch.outer(scale, scale)).all()
    assert covariance[0, WIDTH].abs() > 10 * math.sqrt(2 / count) * scale[0] * scale[WIDTH]


def test_a_gaussian_follows_the_seed(pair):
    weight = random_weight(0).float()
    first, again, other = (pair.start("gaussian", seed)(weight) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.isclose(first, other).all(1).any()
    assert len(first.unique(dim=0)) == pair.U
    assert pair.start("gaussian").record == {"drawn": pair.U}


def oracle_similarities(reader, dimensions):
    """Cosine similarities by loops over the rows, a dense matrix and numpy's decomposition."""
    U, W = reader.metadata["vocab_size"], auxiliary.WINDOW
    counts = np.zeros((U, U))
    for row in range(len(reader)):
        tokens, starts = reader[row][: reader.length(row)], set(reader.document_starts(row))
        document = []
        for position, token in enumerate(tokens):
            if position in starts:
                document = []
            if reader.token_bytes[token] == 0:
                continue
            for d, before in enumerate(reversed(document[-W:]), 1):
                counts[before, token] += (W + 1 - d) / W
                counts[token, before] += (W + 1 - d) / W
            document.append(token)
    total, each = counts.sum(), counts.sum(0)
    information = np.zeros((U, U))
    for a, b in zip(*counts.nonzero(), strict=True):
        information[a, b] = max(math.log(counts[a, b] * total / (each[a] * each[b])), 0)
    left, values, _ = np.linalg.svd(information)
    vectors = (left * np.sqrt(values))[:, :dimensions]
    lengths = np.linalg.norm(vectors, axis=1)
    known = information.any(1)
    unit = vectors / np.where(known, lengths, 1)[:, None]
    return unit @ unit.T, known


@pytest.mark.parametrize("dimensions", [300, 32])
def test_focus(source_model, protein_data, monkeypatch, dimensions):
    """All 64 dimensions that there are, and the leading 32 of them."""
    monkeypatch.setattr(auxiliary, "DIMENSIONS", dimensions)
    pair = Pair(source_model, ShardReader(protein_data, "train"))
    similarity, known = oracle_similarities(pair.data, dimensions)
    pieces = [pair.pieces(number) for number in range(pair.U)]
    shared = [u for u in range(pair.U) if len(pieces[u]) == 1]
    anchors = [u for u in shared if known[u]]
    assert 15 < len(anchors) < pair.U - 15
    for seed in range(3):
        weight = random_weight(seed)
        new, mixed = pair.start("focus", seed)(weight.float()).double(), 0
        mean = mean_of_tokens(weight, pair.source)
        for u in range(pair.U):
            match = special_match(pair, u)
            if u in shared or match is not None:
                expected = weight[pieces[u][0] if u in shared else match]
            elif known[u]:
                shares = sparsemax(torch.tensor(similarity[u, anchors]), dim=0)
                expected = sum(
                    share * weight[pieces[a][0]] for share, a in zip(shares, anchors, strict=True)
                )
                mixed += 1
            else:
                expected = mean
            torch.testing.assert_close(new[u], expected, rtol=0, atol=1e-5)
        assert mixed > 15


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_leading_vectors_of_a_large_matrix(seed):
    """Parts that halve in size: of the leading 6, passes with 12 vectors lose only rounding."""
    random = np.random.default_rng(seed)
    matrix = (random.random((200, 40)) * 0.5 ** np.arange(40)) @ random.random((40, 200))
    matrix[7] = 0
    expected, values, _ = np.linalg.svd(matrix)
    expected = torch.tensor(expected[:, :6] * np.sqrt(values[:6]))
    found = auxiliary.singular_vectors(torch.tensor(matrix).to_sparse(), 6, seed)
    assert found.shape == (200, 6) and not found[7].any()
    # The products have no signs.
    torch.testing.assert_close(found @ found.T, expected @ expected.T, atol=1e-6, rtol=0)


def test_similarity_without_an_anchor_leaves_the_rows_empty():
    """No token that both have occurs in the data; what both have keeps its row."""
    shared = torch.sparse_coo_tensor([[0], [3]], torch.ones(1).double(), (3, 5)).coalesce()
    vectors = torch.tensor([[0.0, 0], [1, 0], [0, 1]], dtype=torch.float64)
    for text, expected in (([True] * 3, shared), ([False, True, True], shared)):
        found = by_similarity(shared, torch.tensor(text), vectors)
        assert torch.equal(found.to_dense(), expected.to_dense())
    vectors[0] = torch.tensor([0.6, 0.8])
    found = by_similarity(shared, torch.tensor([True] * 3), vectors).to_dense()
    assert (found[:, 3] == 1).all() and found.sum() == 3  # one anchor takes everything
    found = by_similarity(shared, torch.tensor([False, True, True]), vectors).to_dense()
    assert torch.equal(found, shared.to_dense())  # a special token is no anchor


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("form", ["ids", "objects", "lists"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_alignment(pair, tmp_path, form, seed):
    random, weight = np.random.default_rng(seed), random_weight(seed)
    old = {i: token for token, i in pair.source.get_vocab().items()}
    new = {i: token for token, i in pair.target.get_vocab().items()}
    table = {
        u: {int(i): float(random.uniform(0, 9)) for i in random.choice(sorted(old), 3, False)}
        for u in new
    }
    if form == "ids":
        table = {u: {next(iter(row)): 1.0} for u, row in table.items()}
        content = {str(u): next(iter(row)) for u, row in table.items()}
    else:
        content = {new[u]: {old[i]: w for i, w in row.items()} for u, row in table.items()}
        if form == "lists":
            content = [[token, list(map(list, row.items()))] for token, row in content.items()]
    start = pair.start("alignment", alignment=write(tmp_path / "a.json", content))
    found = start(weight.float()).double()
    for u, row in table.items():
        expected = sum(w * weight[i] for i, w in row.items()) / sum(row.values())
        torch.testing.assert_close(found[u], expected, **TOLERANCE)
    assert start.record == {"of source tokens": pair.U, "mean of all": 0}


def test_an_alignment_may_leave_out_special_tokens(source_model, protein_data, tmp_path):
    pair = Pair(source_model, ShardReader(protein_data, "train"))
    text = set(pair.target.get_vocab().values()) - set(pair.target.all_special_ids)
    path = write(tmp_path / "a.json", {str(u): 7 for u in text} | {"2": 9})  # 2: <unk>
    weight = random_weight(0).float()
    found = pair.start("alignment", alignment=path)(weight)
    assert torch.equal(found[2], weight[9])
    assert torch.equal(found[pair.target.eos_token_id], weight[pair.source.eos_token_id])


FULL = {str(i): 0 for i in range(64)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "must be JSON of the form"),
        ("7", "must be JSON of the form"),
        ("{}", "must be JSON of the form"),
        ({"a": 1}, "must be JSON of the form"),
        ({"1": "a"}, "must be JSON of the form"),
        ([["A", [["A", "x"]]]], "must be JSON of the form"),
        ([["A", [["A", 1]]], ["A", [["A", 1]]]], "must be JSON of the form"),
        (FULL | {"64": 0}, "names the target id 64, but ids are below 64"),
        (FULL | {"1": 400}, "names the source id 400, but ids are below 400"),
        (FULL | {"1": -1}, "names the source id -1, but"),
        ({"Q9": {"A": 1}}, "names the target token 'Q9', which the target tokenizer does not"),
        ({"A": {"Q9": 1}}, "names the source token 'Q9', which the source tokenizer does not"),
        ({"A": {"A": -1, "C": 2}}, "the weights .*; they must be finite and not negative"),
        ({"A": {"A": 0}}, "they must be finite"),
        ('{"A": {"A": NaN}}', "they must be finite"),
        ({"A": {}}, "they must be finite"),
        ({str(i): 0 for i in range(60)}, "lacks 4 of 64 target tokens, such as the id 60"),
    ],
)
def test_an_alignment_that_does_not_fit_is_refused(
    source_model, protein_data, tmp_path, content, message
):
    pair = Pair(source_model, ShardReader(protein_data, "train"))
    path = tmp_path / "a.json"
    if content is not None:
        write(path, content)
    with pytest.raises(ConfigError, match=message) as caught:
        pair.start("alignment", alignment=path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.fixture
def foreign(source_model, tmp_path):
    """A base model whose tokenizer writes no protein."""
    folder = make_source_model(tmp_path / "foreign", source_model)
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "x": 1}, [], unk_token="<unk>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    write(folder / "tokenizer_config.json", config)
    return folder


@pytest.mark.parametrize("init", ["subtoken_mean", "character_mean", "focus"])
def test_tokenizers_that_have_nothing_in_common_are_refused(foreign, protein_data, init):
    pair = Pair(foreign, ShardReader(protein_data, "train"))
    with pytest.raises(ConfigError, match=f"{init} does not fit: the source tokenizer .* none of"):
        pair.start(init)
    assert pair.start("mean").record == {"of source tokens": 0, "mean of all": 64}


@pytest.mark.parametrize("init", ["subtoken_mean", "alignment"])
def test_a_source_without_tokenizer_is_refused(source_model, protein_data, tmp_path, init):
    folder = make_source_model(tmp_path / "m", source_model)
    pair = Pair(folder, ShardReader(protein_data, "train"))
    (folder / "tokenizer.json").write_text("[]")
    keys = {"alignment": write(tmp_path / "a.json", FULL)} if init == "alignment" else {}
    with pytest.raises(DataError, match="transformers reads no tokenizer"):
        pair.start(init, **keys)


@pytest.mark.parametrize("init", ["mean", "gaussian", "subtoken_mean", "focus"])
def test_a_model_is_folded_with_its_bias(source_tokenizer, protein_data, tmp_path, init):
    """E, L and b by the same map, read back by transformers; a float64 oracle applies it."""
    config = PhiConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    torch.manual_seed(3)
    source = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(source.lm_head.bias)
    folder = tmp_path / "base"
    source.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source_tokenizer / name).read_bytes())
    pair = Pair(folder, ShardReader(protein_data, "train"))
    start, target = pair.start(init), tmp_path / "folded"
    target.mkdir()
    fold(folder, target, lambda weight, _: start(weight), special_ids(pair.data.metadata))
    folded = AutoModelForCausalLM.from_pretrained(target)
    map_UV = start(torch.eye(400)).double()
    for old, new in (
        (source.get_input_embeddings().weight, folded.get_input_embeddings().weight),
        (source.lm_head.weight, folded.lm_head.weight),
        (source.lm_head.bias, folded.lm_head.bias),
    ):
        torch.testing.assert_close(new.double(), map_UV @ old.double(), rtol=1e-4, atol=1e-5)
    assert folded.lm_head.weight is not folded.get_input_embeddings().weight


def test_a_special_token_that_the_data_do_not_know_has_no_row(source_model, protein_data, tmp_path):
    """transformers adds tokens that tokenizer_config.json names and tokenizer.json lacks."""
    data = shutil.copytree(protein_data, tmp_path / "data")
    record, path = artifacts.read_manifest(data), data / "tokenizer" / "tokenizer_config.json"
    write(path, {**json.loads(path.read_text()), "bos_token": "<new>"})
    artifacts.seal(data, record)
    pair = Pair(source_model, ShardReader(data, "train"))
    assert pair.target.bos_token_id == pair.U == 64
    weight = random_weight(0).float()
    text = {str(u): 3 for u in pair.target.get_vocab().values() if u < 64}
    for keys in ({}, {"alignment": write(tmp_path / "a.json", text)}):
        new = pair.start("alignment" if keys else "subtoken_mean", **keys)(weight)
        assert new.shape == (64, WIDTH)


def test_weights_are_exact_in_float64():
    """A third is not float32's third."""
    found = sparse_weights([{1: 1 / 3, 0: 2 / 3}], 3)
    assert found.dtype == torch.float64 and found.values().tolist() == [2 / 3, 1 / 3]


def random_start(seed, V=30, U=12):
    """Weights, the rows of P (not all source tokens), and marginals; token 3 has no weights."""
    random = np.random.default_rng(seed)
    dense = random.random((U, V)) * (random.random((U, V)) < 0.2)
    dense[np.arange(U), random.integers(0, V, U)] += 0.5
    dense[3] = 0
    dense[:, 7] = 0
    dense[4] = np.eye(V)[7]  # only of a token without a row
    rows = torch.tensor([i for i in range(V) if i != 7])
    mu, nu = (torch.tensor(random.random(n) + 0.1) for n in (len(rows), U))
    weights = torch.tensor(dense / np.maximum(dense.sum(1, keepdims=True), 1e-9))
    return weights, rows, mu / mu.sum(), nu / nu.sum()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("method", ["dykstra", "dual", "dense", "plain"])
def test_c_may_begin_at_a_mixture(seed, method):
    """Every solver gives the plan that it began at, and E' and L' are the mixture's, in part.

    Every entry of P is positive, so every entry of C has a gradient.
    """
    weights, rows, mu, nu = random_start(seed)
    share, (R, U) = 0.8, (len(rows), len(nu))
    new_mu, plan = warm_start(weights.to_sparse(), rows, mu, nu, share)
    expected = np.zeros((R, U))
    for j in range(U):
        known = sum(float(weights[j, i]) for i in rows)
        for r, i in enumerate(rows):
            placed = share * float(weights[j, i]) / known if known else 0
            rest = 1 - share if known else 1
            expected[r, j] = float(nu[j]) * (placed + rest * float(mu[r]))
    torch.testing.assert_close(plan(slice(0, R)), torch.tensor(expected).float())
    assert torch.equal(plan(slice(5, 20)), plan(slice(0, R))[5:20])
    assert plan(slice(9, 9)).shape == (0, U)
    torch.testing.assert_close(new_mu, torch.tensor(expected.sum(1)), rtol=1e-12, atol=0)
    np.testing.assert_allclose(expected.sum(0), nu)
    embed, head = random_weight(seed, R).float(), random_weight(seed + 9, R).float()
    for units in ("row_mass", "literal"):
        translator = Translator(
            embed, head, new_mu, nu, solver=make_solver(method), embed_scale="convex",
            units=units, first_plan_VU=plan(slice(0, R)),
        )  # fmt: skip
        translated = translator.translate()
        means = torch.tensor(expected / nu.numpy()).T
        for found, old in ((translated.embed_UD, embed), (translated.head_UD, head)):
            torch.testing.assert_close(found.double(), means @ old.double(), rtol=1e-4, atol=1e-5)
        (translated.embed_UD.square().sum() + translated.head_UD.sum()).backward()
        translator.backward(translated)
        translator.clip_grad_norm(0)
        assert translator.statistics()["gradient_share"] == 1.0
