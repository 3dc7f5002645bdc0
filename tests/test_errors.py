import pickle

import pytest

from rayltx import errors

EVERY_ERROR = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


@pytest.mark.parametrize("error", EVERY_ERROR, ids=lambda error: error.__name__)
def test_every_error_survives_pickling(error):
    copy = pickle.loads(pickle.dumps(error("rank 1: value=3, rule, remedy")))
    assert type(copy) is error and copy.args == ("rank 1: value=3, rule, remedy",)


def test_the_tree_is_as_drawn():
    for error in EVERY_ERROR:
        assert error.__name__ in errors.__doc__, f"{error.__name__} is missing in the tree"
        assert issubclass(error, errors.RayLTXError)
    assert issubclass(errors.UserError, ValueError) and issubclass(errors.ClusterError, RuntimeError)
