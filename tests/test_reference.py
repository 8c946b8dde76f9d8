"""The dense reference against loops over Python floats, and against numbers worked out on paper."""

import itertools

import pytest
import torch
from by_hand import route_by_hand

from graphcaps import reference


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@pytest.mark.parametrize(("children", "parents", "dim"), [(1, 1, 1), (4, 3, 2), (7, 2, 5)])
def test_the_reference_equals_the_procedure_in_loops(children, parents, dim, iterations):
    u_hat = torch.randn(2, children, parents, dim, dtype=torch.float64)
    v, c = reference.dynamic_routing(u_hat, iterations)
    edges = list(itertools.product(range(children), range(parents)))
    for sample in range(2):
        votes = u_hat[sample].reshape(-1, dim).tolist()
        v_by_hand, c_by_hand = route_by_hand(edges, votes, children, parents, iterations)
        torch.testing.assert_close(v[sample], torch.tensor(v_by_hand, dtype=torch.float64))
        torch.testing.assert_close(
            c[sample].flatten(), torch.tensor(c_by_hand, dtype=torch.float64)
        )


def test_the_reference_routes_along_the_edges_of_its_mask_alone():
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    u_hat = torch.randn(1, 4, 3, 2, dtype=torch.float64)
    v, c = reference.dynamic_routing(u_hat, 3, mask=mask)
    v_by_hand, c_by_hand = route_by_hand(mask.nonzero().tolist(), u_hat[0][mask].tolist(), 4, 3, 3)
    torch.testing.assert_close(v[0], torch.tensor(v_by_hand, dtype=torch.float64))
    torch.testing.assert_close(c[0][mask], torch.tensor(c_by_hand, dtype=torch.float64))
    assert c[0][~mask].eq(0).all()


def test_one_child_and_one_parent_give_the_squashed_vote():
    v, c = reference.dynamic_routing(torch.tensor([[[[0.0, 3.0]]]]), 3)
    assert c.item() == 1
    torch.testing.assert_close(v, torch.tensor([[[0.0, 0.9]]]))  # 9/10 of a unit vector


def test_votes_are_the_matrices_applied_to_the_poses():
    u, weight = torch.randn(2, 3, 4), torch.randn(3, 5, 4, 6)
    u_hat = reference.votes(u, weight)
    torch.testing.assert_close(u_hat[1, 2, 3], weight[2, 3].T @ u[1, 2])


def test_gradients_of_the_reference_are_those_of_finite_differences():
    u_hat = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference.dynamic_routing(x, 3), (u_hat,))


def test_the_reference_is_finite_at_zero_votes():
    u_hat = torch.zeros(1, 3, 2, 4, requires_grad=True)
    v, _ = reference.dynamic_routing(u_hat, 3)
    v.sum().backward()
    assert v.eq(0).all()
    assert u_hat.grad.isfinite().all()


def test_the_reference_refuses_to_route_without_an_iteration():
    with pytest.raises(ValueError, match="at least 1; got 0"):
        reference.dynamic_routing(torch.zeros(1, 3, 2, 4), iterations=0)
