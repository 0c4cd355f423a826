"""What a stage says while it runs."""

from nbg_core.base.progress import Progress, time


def test_time_left_is_measured_from_the_first_advance_on(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress("student_checkpoint", 41, lines.append)
    for seconds in (30.0, 31.0, 31.5, 40.0):  # the first one compiled
        now[0] = seconds
        progress.advance(1 if seconds == 30.0 else 10, "loss 1")
    now[0] = 45.0
    progress.advance(10)
    assert lines == [
        "student_checkpoint: 1/41, loss 1",
        "student_checkpoint: 11/41, 10.0/s, 3 s left, loss 1",
        "student_checkpoint: 31/41, 3.0/s, 3 s left, loss 1",
        "student_checkpoint: 41/41, 2.7/s",
    ]


def test_all_at_once_has_a_rate(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress("queries", 8, lines.append)
    now[0] = 2.0
    progress.advance(8)
    assert lines == ["queries: 8/8, 4.0/s"]


def test_what_comes_at_once_after_the_work_took_all_the_time(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress("student_eval: before", 300, lines.append)
    for i in range(300):
        now[0] = 3.0 + i / 1e5
        progress.advance(1)
    assert lines[-1] == "student_eval: before: 300/300, 99.9/s"
