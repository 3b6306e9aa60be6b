"""The plan of the FFN experts' work: which assignments they compute, and in which row of whose product.

T tokens, K choices a token, A = T·K assignments, F = n_ffn, R rows: those of the first expert, of the second, ….
Made once for a layer's tokens; looped.py, or permute.py and grouped.py, carry it out.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .balance import count_assignments


@dataclass
class Plan:
    """Rows sorted by expert, those of one expert by token: a permutation of the assignments that are computed, and
    its inverse.

    Two tokens that chose experts (1, 0) and (0, 2), of which 2 is no FFN expert, have assignments 0 to 3:
    `assignment_R` is (1, 2, 0), the rows of expert 0 and then of 1, and `row_TK` ((2, 0), (1, –)).

    Attributes:
        count_F: (F,) int64, rows of each expert.
        assignment_R: (R,) the assignment (t·K + k) of each row; of spare rows (`rounded_up`) 0.
        token_R: (R,) the token of each row.
        row_TK: (T, K) the row of each assignment that is computed, 0 for the others.
        computed_TK: (T, K) bool, where some FFN expert computes the assignment.
    """

    count_F: Tensor
    assignment_R: Tensor
    token_R: Tensor
    row_TK: Tensor
    computed_TK: Tensor

    @staticmethod
    def of(experts_TK: Tensor, computed_TK: Tensor, n_ffn: int, max_rows: int | None = None) -> "Plan":
        """A plan of exactly the rows there are. Only the device knows how many that is, and the host waits for it.

        With `max_rows` the host does not wait, which would stall a stream of CUDA: R is that many (one at least),
        and the rows after the last expert's are garbage (NaN too) that nothing may read.
        """
        expert_A = torch.where(computed_TK, experts_TK, n_ffn).flatten()  # all others behind the FFN experts
        if max_rows is None:
            computed = computed_TK.flatten().nonzero()[:, 0]
            assignment_R = computed[expert_A[computed].argsort(stable=True)]
        else:
            assignment_R = expert_A.argsort(stable=True)[: max(1, max_rows)]
        row_A = torch.zeros_like(expert_A)
        row_A[assignment_R] = torch.arange(len(assignment_R), device=expert_A.device)
        return Plan(
            count_F=count_assignments(expert_A[assignment_R], n_ffn),
            assignment_R=assignment_R,
            token_R=assignment_R // experts_TK.shape[1],
            row_TK=row_A.view_as(experts_TK).where(computed_TK, 0),
            computed_TK=computed_TK,
        )

    def first(self, n_rows: int) -> "Plan":
        """Without the garbage behind them, for a host that has learned how many rows are computed."""
        return replace(self, assignment_R=self.assignment_R[:n_rows], token_R=self.token_R[:n_rows])

    def rounded_up(self, multiple: int) -> "Plan":
        """The rows of each expert rounded up to a multiple. Spare rows are the first token's, of no assignment."""
        spare_F = -self.count_F % multiple
        before_F = spare_F.cumsum(0) - spare_F
        row_R = before_F.repeat_interleave(self.count_F)
        row_R += torch.arange(len(row_R), device=row_R.device)
        count_F = self.count_F + spare_F
        assignment_R = row_R.new_zeros(int(count_F.sum())).index_copy_(0, row_R, self.assignment_R)
        row_TK = self.row_TK.flatten().index_copy(0, self.assignment_R, row_R).view_as(self.row_TK)
        token_R = assignment_R // row_TK.shape[1]
        return Plan(count_F, assignment_R, token_R, row_TK, self.computed_TK)

    @cached_property
    def counts(self) -> list[int]:
        """`count_F` for the host, which waits for it."""
        return self.count_F.tolist()

    @cached_property
    def by_token(self) -> tuple[Tensor, Tensor]:
        """(R,) the rows in the order of their tokens, and (T,) where among them each token's begin."""
        count_T = self.computed_TK.sum(1)
        return self.row_TK[self.computed_TK], count_T.cumsum(0) - count_T
