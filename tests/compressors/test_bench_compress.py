"""`deltaworks bench compress` on a tiny Llama: every method at its bytes, its best setting chosen on other rows."""

import json

import pytest

from compressors.errors import DeltaError
from server.bench.compress import read_questions
from server.cli import main


@pytest.fixture(scope="module")
def measured(language_pair, tmp_path_factory):
    _, base, tuned = language_pair
    folder = tmp_path_factory.mktemp("bench")
    held_out = folder / "held_out.jsonl"
    rows = [{"prompt": "the quick fox", "completion": "jumps over the lazy dog and runs far away from here"}] * 48
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = tuned / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    try:
        command = ["bench", "compress", "--base", str(base), "--fine-tune", str(tuned), "--held-out", str(held_out)]
        command += [
            "--bytes-ratios",
            "4",
            "--seeds",
            "2",
            "--sequences",
            "1",
            "--max-tokens",
            "4",
            "--distil-steps",
            "20",
        ]
        code = main([*command, "--json", str(folder / "b.json"), "--plot", str(folder / "b.png")])
    finally:
        template.unlink()
    assert code == 0
    return json.loads((folder / "b.json").read_text()), folder / "b.png"


@pytest.mark.slow
def test_every_method_is_at_its_bytes(measured):
    rows = {row["method"]: row for row in measured[0]["rows"]}
    assert set(rows) == {"impart", "impart-qt", "lowrank", "dare", "bitdelta", "bitdelta-distil"}
    for method, row in rows.items():
        assert row["projection_bytes"] * 1.02 >= 4 or method == "lowrank", method
        assert len(row["kl"]) == (1 if method == "lowrank" or "bitdelta" in method else 2)
        assert row["kl"][0] > 0
        assert row["peak_mib"] > 50
        assert row["seconds"] > 0
    assert rows["impart"]["kl"][0] != rows["impart"]["kl"][1]  # other masks
    assert rows["bitdelta-distil"]["kl"][0] < rows["bitdelta"]["kl"][0]


@pytest.mark.slow
def test_base_and_fine_tune_frame_it(measured):
    told = measured[0]["references"]
    assert told["fine-tune"]["kl"] < 1e-6
    assert min(row["kl"][0] for row in measured[0]["rows"]) < told["base"]["kl"]
    assert measured[1].stat().st_size > 5000


def test_bad_rows_are_named(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(DeltaError, match="line 2: expected an object with prompt and completion"):
        read_questions(file)
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b", "tools": [{}]}\n')
    with pytest.raises(DeltaError, match="has 1 rows without tools"):
        read_questions(file)


@pytest.mark.slow
def test_the_loop_over_svds_compresses_the_same(language_pair, tmp_path, capsys):
    _, base, tuned = language_pair
    held_out = tmp_path / "held_out.jsonl"
    row = {"prompt": "the quick fox", "completion": "jumps over the lazy dog and runs far away from here"}
    held_out.write_text((json.dumps(row) + "\n") * 12)
    template = tuned / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    command = ["bench", "compress-loop", "--base", str(base), "--fine-tune", str(tuned), "--held-out", str(held_out)]
    try:
        code = main(
            [
                *command,
                "--ratio",
                "2",
                "--beta",
                "0",
                "--sequences",
                "1",
                "--repeats",
                "1",
                "--json",
                f"{tmp_path}/l.json",
            ]
        )
    finally:
        template.unlink()
    assert code == 0, capsys.readouterr().err
    rows = {row["name"]: row for row in json.loads((tmp_path / "l.json").read_text())["rows"]}
    assert rows["SVD loop, time"]["value"] > 0
    assert 0.5 < rows["delta compress, loss"]["ratio"] < 2
