"""The exact search in torch against brute force and FAISS: ties, pieces, groups, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import nearest_by_loop
from hypothesis import given, settings
from hypothesis import strategies as st

from nndefense.database.exact_search import ExactSearch, squared_distances
from nndefense.database.index import TorchIndex
from nndefense.database.index_training import build_index
from nndefense.errors import InputError


def draw(*shape: int, seed: int = 0, whole: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if whole:
        return torch.randint(-2, 3, shape, generator=generator).float()
    return torch.randn(*shape, generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 60), d=st.integers(1, 9), q=st.integers(0, 5), piece=st.integers(1, 70), seed=st.integers(0, 999),
    k=st.integers(1, 60), whole=st.booleans(),
)  # fmt: skip
def test_search_is_brute_force_for_any_shape(n, d, q, piece, seed, k, whole):
    rows, queries, k = draw(n, d, seed=seed, whole=whole), draw(q, d, seed=seed + 1000, whole=whole), min(k, n)
    distances, found = ExactSearch(rows, piece=piece).search(queries, k)
    wanted, _ = nearest_by_loop(queries.numpy(), rows.numpy(), k)
    assert distances.shape == found.shape == (q, k)
    np.testing.assert_allclose(distances.numpy(), wanted, atol=1e-6 if whole else 2e-3)
    # With ties the rows are not determined, but they are as near as they say and none is found twice.
    own = np.linalg.norm(queries.numpy()[:, None] - rows.numpy()[found.numpy()], axis=2)
    np.testing.assert_allclose(own, wanted, atol=1e-6 if whole else 2e-3)
    assert all(len(set(row)) == k for row in found.tolist())


def test_a_thousand_vectors_have_the_neighbours_of_brute_force_and_of_faiss():
    rows, queries = draw(1000, 24), draw(50, 24, seed=1)
    wanted = nearest_by_loop(queries.numpy(), rows.numpy(), 50)[1]
    faiss = build_index("Flat", 24, rows.numpy(), [rows.numpy()]).search(queries.numpy(), 50)
    torch_index = TorchIndex(lambda first, last: rows.numpy()[first:last], 1000, piece=333).search(queries.numpy(), 50)
    ours = ExactSearch(rows, piece=77).search(queries, 50)
    assert [set(row) for row in ours[1].tolist()] == [set(row) for row in wanted.tolist()]
    np.testing.assert_array_equal(ours[1].numpy(), faiss[1])
    np.testing.assert_array_equal(torch_index[1], faiss[1])
    np.testing.assert_allclose(ours[0].numpy(), faiss[0], atol=1e-3)


@pytest.mark.parametrize("piece", [1, 7, 40, 1000])
def test_groups_confine_the_search(piece):
    rows, queries = draw(200, 6), draw(12, 6, seed=1)
    groups, asked = torch.arange(200) % 5, torch.arange(12) % 5
    search = ExactSearch(rows, groups, piece=piece)
    everything = torch.cdist(queries, rows)
    for name, allowed in (("of", groups[None] == asked[:, None]), ("but", groups[None] != asked[:, None])):
        distances, found = search.search(queries, 9, **{name: asked})
        wanted = everything.masked_fill(~allowed, torch.inf).topk(9, largest=False)
        assert torch.allclose(distances, wanted.values, atol=1e-3)
        assert torch.equal(found, wanted.indices)


def test_a_group_with_too_few_rows_leaves_places_at_infinity():
    search = ExactSearch(draw(10, 3), torch.tensor([0] * 8 + [1] * 2), piece=3)
    distances, _ = search.search(draw(4, 3, seed=2), 5, of=torch.tensor([1, 1, 0, 7]))
    assert torch.isfinite(distances).sum(1).tolist() == [2, 2, 5, 0]
    assert bool((distances[:, 1:] >= distances[:, :-1]).all())


def test_distances_have_the_gradient_of_their_formula():
    queries, vectors = draw(3, 4).double().requires_grad_(), draw(3, 5, 4, seed=1).double()
    assert torch.autograd.gradcheck(lambda q: squared_distances(q, vectors), (queries,))
    found = squared_distances(queries, vectors)
    assert torch.allclose(found, (queries[:, None] - vectors).norm(dim=2) ** 2)
    # At distance 0 the gradient is 0, not NaN.
    at_zero = vectors[:, 0].clone().requires_grad_()
    squared_distances(at_zero, vectors)[:, 0].sum().backward()
    assert torch.equal(at_zero.grad, torch.zeros_like(at_zero))


def test_a_search_keeps_no_graph_and_takes_double():
    queries = draw(2, 3).double().requires_grad_()
    distances, found = ExactSearch(draw(9, 3, seed=1).double()).search(queries, 2)
    assert not distances.requires_grad
    assert distances.dtype == torch.float64
    assert torch.equal(found, torch.cdist(queries, draw(9, 3, seed=1).double()).topk(2, largest=False).indices)


def test_bad_input():
    for rows in (torch.zeros(0, 3), torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64)):
        with pytest.raises(InputError, match="float rows n x d"):
            ExactSearch(rows)
    with pytest.raises(InputError, match="4 rows need as many groups"):
        ExactSearch(torch.zeros(4, 2), torch.zeros(3))
    with pytest.raises(InputError, match="piece is 0"):
        ExactSearch(torch.zeros(4, 2), piece=0)
    search = ExactSearch(torch.zeros(4, 2))
    for k in (0, 5):
        with pytest.raises(InputError, match=f"k is {k}, but must be from 1 to the 4 rows"):
            search.search(torch.zeros(1, 2), k)
    with pytest.raises(InputError, match="must be N x 2"):
        search.search(torch.zeros(1, 3), 1)
    with pytest.raises(InputError, match="needs the group of every row"):
        search.search(torch.zeros(1, 2), 1, of=torch.zeros(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same_rows():
    rows, queries = draw(500, 16), draw(20, 16, seed=1)
    expected = ExactSearch(rows).search(queries, 10)[1]
    assert torch.equal(ExactSearch(rows.cuda(), piece=100).search(queries.cuda(), 10)[1].cpu(), expected)
