"""Records on disk: appended, completed in place, and never in the way of serving."""

import json

from gimbal.core.snapshot import Field, plausible
from gimbal.records.schema import RebalanceRecord
from gimbal.vllm_plugin.placement.rebalance_log import RebalanceLog


def record(time_s, committed=True):
    return RebalanceRecord(
        time_s=time_s,
        committed=committed,
        reason="test",
        predicted_gain_us_per_step=5.0,
        predicted_stall_us=7.0,
        realized_gain_us_per_step=None,
        stall_us=None,
        moved_slots=1,
        received_experts=1,
        balance_before=0.5,
        balance_after=0.9,
        local_share_before=None,
        local_share_after=None,
    )


def lines(folder):
    return [json.loads(t) for t in (folder / "rebalances.jsonl").read_text().splitlines()]


def test_the_last_record_is_completed_in_place(tmp_path):
    log = RebalanceLog(tmp_path / "deep")
    log.add(record(1.0))
    log.amend(stall_us=3.0)
    log.amend(realized_gain_us_per_step=4.0)
    log.add(record(2.0, committed=False))
    log.amend(stall_us=9.0)
    first, second = lines(tmp_path / "deep")
    assert (first["time_s"], first["stall_us"], first["realized_gain_us_per_step"]) == (1, 3, 4)
    assert (second["time_s"], second["stall_us"]) == (2, 9)
    assert (log.proposed, log.committed) == (2, 1)


def test_another_run_appends(tmp_path):
    RebalanceLog(tmp_path).add(record(1.0))
    second = RebalanceLog(tmp_path)
    second.add(record(2.0))
    second.amend(stall_us=1.0)
    assert [r["time_s"] for r in lines(tmp_path)] == [1.0, 2.0]


def test_a_file_taken_away_comes_back(tmp_path):
    log = RebalanceLog(tmp_path)
    log.add(record(1.0))
    log.add(record(2.0))
    (tmp_path / "rebalances.jsonl").unlink()
    log.amend(stall_us=1.0)
    assert [r["time_s"] for r in lines(tmp_path)] == [2.0]


def test_a_place_that_cannot_be_written_costs_the_records_only(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    log = RebalanceLog(tmp_path / "file")
    log.add(record(1.0))
    log.amend(stall_us=1.0)
    assert log.last.stall_us == 1.0
    assert log.lost == 2
    assert len([r for r in caplog.records if "serving goes on" in r.message]) == 1


def test_a_full_disk_leaves_whole_lines_and_no_hole_once_there_is_room(tmp_path, full_disk):
    log = RebalanceLog(tmp_path)
    log.add(record(1.0))
    size = (tmp_path / "rebalances.jsonl").stat().st_size
    full_disk(size + 20)
    log.add(record(2.0))
    assert [r["time_s"] for r in lines(tmp_path)] == [1.0]
    log.amend(stall_us=3.0)
    assert [r["time_s"] for r in lines(tmp_path)] == [1.0]
    assert log.lost == 2
    full_disk(None)
    log.amend(realized_gain_us_per_step=4.0)
    log.add(record(5.0))
    assert [r["time_s"] for r in lines(tmp_path)] == [1.0, 2.0, 5.0]
    assert lines(tmp_path)[1]["stall_us"] == 3.0


def test_without_a_directory_the_last_record_is_kept():
    log = RebalanceLog(None)
    log.amend(stall_us=1.0)
    assert log.last is None
    log.add(record(1.0))
    assert log.last.time_s == 1.0


def test_what_came_of_all_records_is_summed_up():
    log = RebalanceLog(None)
    log.add(record(1.0, committed=False), expert_bytes=100.0)
    assert log.unsent
    assert log.figures[Field.PLACEMENT_PROPOSALS] == 1
    assert log.figures[Field.PLACEMENT_COMMITS] == 0
    assert log.figures[Field.PLACEMENT_RECEIVED_BYTES] == 0.0
    assert log.figures[Field.PLACEMENT_PREDICTED_GAIN_US] == 0.0
    assert log.figures[Field.PLACEMENT_BALANCE] == 0.5
    for stall_us in (3.0, 4.0):
        log.add(record(2.0), expert_bytes=100.0)
        log.amend(stall_us=stall_us)
    log.amend(realized_gain_us_per_step=-2.0)
    assert log.figures[Field.PLACEMENT_COMMITS] == 2
    assert log.figures[Field.PLACEMENT_RECEIVED_EXPERTS] == 2
    assert log.figures[Field.PLACEMENT_RECEIVED_BYTES] == 200.0
    assert log.figures[Field.PLACEMENT_STALL_US] == 7.0
    assert log.figures[Field.PLACEMENT_PREDICTED_GAIN_US] == 5.0
    assert log.figures[Field.PLACEMENT_REALIZED_GAIN_US] == 0.0
    assert log.figures[Field.PLACEMENT_REALIZED_LOSS_US] == 2.0
    assert log.figures[Field.PLACEMENT_BALANCE] == 0.9
    log.amend(realized_gain_us_per_step=3.0)
    assert log.figures[Field.PLACEMENT_REALIZED_GAIN_US] == 3.0
    assert log.figures[Field.PLACEMENT_REALIZED_LOSS_US] == 0.0
    assert all(plausible(value) for value in log.figures.values())
