"""What each of several runs at a time gets of the machine."""

import pytest

from dia_lightning.reproduce import pool


def test_jobs_share_threads_or_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert pool._environments(3) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert pool._environments(20)[0] == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in pool._environments(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [share["CUDA_VISIBLE_DEVICES"] for share in pool._environments(3)] == ["5", "7", "5"]
