import pytest

from rank_pool import RankPool


@pytest.fixture(scope="session")
def ranks():
    """Four gloo ranks: `ranks.run(world_size, function, *args)`."""
    pool = RankPool(4)
    yield pool
    pool.close()
