"""A short soak; `python -m tests.soak` is the long one."""

import pytest

from tests import commands, soak


@pytest.mark.ci
@pytest.mark.timeout(900)
def test_killed_at_random_it_ends_the_same(tmp_path):
  killed = soak.Soak(tmp_path, commands.TINY, num_processes=1, seed=1)
  killed.run(4)
  assert killed.done.total() == 4
