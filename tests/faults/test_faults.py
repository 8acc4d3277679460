"""A short run of faults over the four programs; the long one is fault_run.py."""

import argparse

import pytest
from fault_run import run


@pytest.mark.slow
def test_faults_leave_the_same_bytes_or_are_named(tmp_path, programs):
    given = argparse.Namespace(kills=6, flips=2, truncations=2, disks=2, changes=1, seed=6)
    found = run(tmp_path, programs, given)
    assert not found.failures, "\n".join(found.failures)
    assert found.counts["kills"] == 6 and found.counts["byte flip"] == 2
