"""What programs that train many models share."""

import pytest

from studies.runs.figures import Label, new_figure, place_labels
from studies.runs.records import Key, Records

RECORDS = Records("studies.some", frozenset({"quality"}), times=frozenset({"us"}))


def run(seed=0, quality=2.0):
    return {"task": "characters", "row": "dense", "seed": seed, "steps": 500, "quality": quality}


@pytest.mark.parametrize(
    "damage", [b'{"task": "char', b"\x00\x00\x00\n", b'{"task": "characters"}', b"[1, 2", b"x" * 9999]
)
def test_a_damaged_last_line_is_left_out_and_cut_off(tmp_path, damage):
    path = tmp_path / "runs.jsonl"
    RECORDS.append(path, run(0))
    with path.open("ab") as file:
        file.write(damage)
    assert [each["seed"] for each in RECORDS.read(path)] == [0]
    RECORDS.append(path, run(1))
    assert [each["seed"] for each in RECORDS.read(path)] == [0, 1]
    assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("foreign", ['{"quality": 1}\n', '{"task": 1, "row": 2, "seed": 3, "steps": 4}\n', "[]\n"])
def test_a_foreign_file_is_refused_and_kept(tmp_path, foreign):
    path = tmp_path / "notes"
    path.write_text(foreign, encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1: not of studies\.some; name another file"):
        RECORDS.append(path, run())
    assert path.read_text(encoding="utf-8") == foreign


def test_files_are_joined(tmp_path):
    for name, quality in (("a", 1.0), ("b", 2.0)):
        RECORDS.append(tmp_path / name, run(quality=quality))
    RECORDS.append(tmp_path / "b", run(seed=1))
    key = Key("characters", "dense", 0, 500)
    for us in (3.0, 4.0):
        RECORDS.append(tmp_path / "b", key._asdict() | {"us": us})
    runs, times = RECORDS.read_files([tmp_path / "a", tmp_path / "b"])
    assert [key.seed for key in runs] == [0, 1]
    assert runs[key]["quality"] == 2.0
    assert {key: line["us"] for key, line in times.items()} == {key: 4.0}
    with pytest.raises(FileNotFoundError):
        RECORDS.read_files([tmp_path / "c"])
    (tmp_path / "d").touch()
    with pytest.raises(ValueError, match="no finished run"):
        RECORDS.read_files([tmp_path / "d"])


def test_labels_keep_apart():
    axes = new_figure(4, 3).subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    place_labels(axes, [Label(f"label {k}", 0.5, 0.5 + k / 1000, "black") for k in range(4)])
    boxes = [note.get_window_extent() for note in axes.texts]
    assert len(boxes) == 4
    assert all(not a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
