"""A short run of faults over the four programs; the long one is fault_run.py."""

import argparse

import pytest
from fault_run import run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "damages", "disks"), [(6, 2, 2), pytest.param(60, 20, 8, marks=pytest.mark.long)]
)
def test_faults_leave_the_same_bytes_or_are_named(tmp_path, programs, kills, damages, disks):
    given = argparse.Namespace(kills=kills, flips=damages, truncations=damages, disks=disks, seed=kills)
    found = run(tmp_path, programs, given)
    assert not found.failures, "\n".join(found.failures)
    assert found.counts["kills"] == kills and found.counts["byte flip"] == damages
