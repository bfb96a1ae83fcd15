import itertools

from tests.ot.covering import pairwise


def test_every_two_values_meet_in_few_cases():
    factors = ["abcdefgh", range(7), range(5), [True, False]]
    cases = pairwise(*factors)
    for (i, one), (j, other) in itertools.combinations(enumerate(factors), 2):
        assert {(case[i], case[j]) for case in cases} == set(itertools.product(one, other))
    assert len(cases) < 80  # of 560; 56 at least
    assert pairwise(*factors) == cases
