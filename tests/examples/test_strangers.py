"""Input from strangers: files that lead elsewhere, that run code, that blow up, or that say two things at once."""

import json
import os
import pickle
import threading
import time
from pathlib import Path

import datasets
import pytest
from conftest import GOOD, HEIGHT, WIDTH, Opens, two, write_jsonl
from PIL import Image

from evaluate import EvaluateConfig
from sayo.examples import pictures
from sayo.examples.benchmarks import load_benchmark
from sayo.examples.load import load_examples
from sayo.examples.pictures import DataError, load_picture
from sayo.examples.rows import open_rows
from sayo.model.families import PolicyError
from sayo.model.loading import load_policy
from sayo.settings import LARGEST_FILE, ConfigError, read_config, read_jsonl
from train_rl import Config


@pytest.fixture
def outside(folder, tmp_path) -> Path:
    """A folder beside that of the data, with a picture; the data's folder has links to both."""
    for place in (tmp_path / "outside", tmp_path / "data2"):  # the latter begins with the name of the data's folder
        place.mkdir()
        Image.new("RGB", (WIDTH, HEIGHT), "green").save(place / "c.png")
    (folder / "link.png").symlink_to(tmp_path / "outside" / "c.png")
    (folder / "folder").symlink_to(tmp_path / "outside")
    (folder / "inner.png").symlink_to(folder / "a.png")
    return tmp_path / "outside"


LEADING_OUT = "../outside/c.png ./../outside/c.png x/../../outside/c.png {}/c.png link.png folder/c.png ../data2/c.png"


@pytest.mark.parametrize("kind", ["image", "mask"])
@pytest.mark.parametrize("path", LEADING_OUT.split())
def test_a_path_or_link_out_of_the_datas_folder_is_refused_unless_allowed(folder, outside, path, kind):
    home, path = outside.with_name("data2" if "data2" in path else "outside"), path.format(outside)
    for row in (GOOD | {kind: path}, GOOD | {kind: {"bytes": None, "path": path}}):
        data = write_jsonl(folder, row | {"id": "7"}, GOOD)
        with pytest.raises(DataError, match=f"lies outside of(?s:.*)--allowed_folders {home}$") as raised:
            load_examples(data)
        assert "(id '7')" in str(raised.value) and repr(path) in str(raised.value)
        assert len(load_examples(data, bad_rows="skip")) == 1
        for allowed in (home, home.parent, "/") if not path.startswith("x/") else ():  # there is no folder x
            assert load_examples(data, allowed_folders=["/nowhere", str(allowed)])[0]["id"] == "7"


def test_a_path_that_comes_back_into_the_folder_is_inside(folder, outside, tmp_path, monkeypatch):
    paths = ["../data/a.png", "./a.png", str(folder / "a.png"), "inner.png", f"{tmp_path}/way/a.png"]
    (tmp_path / "way").symlink_to(folder)
    data = write_jsonl(folder, *(GOOD | {"image": path} for path in paths))
    monkeypatch.chdir(folder)
    for name in (data, "train.jsonl", f"{tmp_path}/way/train.jsonl"):
        assert len(load_examples(name)) == len(paths)


@pytest.mark.parametrize("address", ["file:///etc/hostname", "http://a.org/b.png", "hf://datasets/a/b@c/d.png",
                                     "zip://a.png::https://a.org/b.zip", "s3://bucket/a.png"])  # fmt: skip
@pytest.mark.parametrize("kind", ["image", "mask"])
def test_an_address_is_no_file_even_where_everything_is_allowed(folder, address, kind):
    with pytest.raises(DataError, match=f"{kind.replace('image', 'picture')} .* is not a file; save it"):
        load_examples(write_jsonl(folder, GOOD | {kind: address}), allowed_folders=["/"])


def test_parquet_and_saved_tables_are_held_to_it_too(folder, outside):
    rows = [GOOD | {"image": {"bytes": None, "path": str(outside / "c.png")}}]
    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    for table in (folder / "rows.parquet", folder / "saved"):
        with pytest.raises(DataError, match="lies outside of"):
            load_examples(str(table))
        assert len(load_examples(str(table), allowed_folders=[str(outside)])) == 1


def test_a_snapshot_of_the_hubs_cache_is_a_data_set(folder, tmp_path):
    """Its files are links into blobs. A link named blobs that leads anywhere must not open that place."""
    snapshot, blobs = (tmp_path / "datasets--a--b" / place for place in ("snapshots/c0ffee", "blobs"))
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (folder / "a.png").rename(blobs / "1f")
    (snapshot / "a.png").symlink_to("../../blobs/1f")
    data = write_jsonl(snapshot, GOOD)
    assert load_examples(data)[0]["image"].getpixel((0, 0)) == (255, 0, 0)
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="lies outside of"):
        load_examples(data)


@pytest.mark.parametrize("files", ["../outside/rows.jsonl", "{outside}/rows.jsonl"])
def test_the_readme_of_a_folder_cannot_lead_out_of_it(folder, outside, files):
    """`datasets` itself follows data_files wherever they lead."""
    write_jsonl(outside, GOOD, name="rows.jsonl")
    files = files.format(outside=outside)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n")
    with pytest.raises(DataError, match="data file .*rows.jsonl'.* lies outside of"):
        load_examples(str(folder))
    assert len(open_rows(str(folder), "train", [str(outside)])) == 1


def saved(folder: Path, rows: int = 1) -> Path:
    datasets.Dataset.from_list([GOOD | {"id": str(number)} for number in range(rows)]).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("way", ["a name in state.json", "a whole name", "a linked file", "a linked state.json",
                                 "a split elsewhere", "a linked split"])  # fmt: skip
def test_a_saved_folder_cannot_lead_out_of_itself(folder, outside, way):
    """`datasets` reads whatever file or folder the JSON names."""
    elsewhere, own = saved(outside / "table"), saved(folder / "own")
    arrow, state = next(own.glob("*.arrow")), json.loads((own / "state.json").read_text())
    if "name" in way:
        target = f"../../outside/table/{arrow.name}" if way == "a name in state.json" else str(elsewhere / arrow.name)
        (own / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": target}]}))
    elif "split" in way:
        own = folder / "splits"
        own.mkdir()
        (own / "dataset_dict.json").write_text(
            json.dumps({"splits": ["train" if "linked" in way else "../../outside/table"]})
        )
        (own / "train").symlink_to(elsewhere)
    else:
        place = arrow if way == "a linked file" else own / "state.json"
        place.unlink()
        place.symlink_to(elsewhere / place.name)
    with pytest.raises(DataError, match="data file .* lies outside of .*--allowed_folders"):
        load_examples(str(own))
    with pytest.raises(DataError, match="data file .* lies outside of"):
        load_benchmark("m3cot", copy=own)
    assert way == "a split elsewhere" or len(open_rows(str(own), "train", [str(outside)])) == 1
    saved(folder / "good", 2)
    (outside / "link").symlink_to(folder / "good")  # a link to all of it
    assert len(open_rows(str(outside / "link"), "train")) == 2


def test_code_in_a_folder_of_data_is_not_run(tmp_path):
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "evil.pkl").write_bytes(pickle.dumps(Opens(tmp_path / "ran")))
    with pytest.raises(DataError, match="cannot be loaded"):
        load_examples(str(folder))
    assert not (tmp_path / "ran").exists()


def test_allowed_folders_must_exist_and_reach_every_script(tmp_path):
    with pytest.raises(ConfigError, match="allowed_folders=.*there is no such folder"):
        read_config(Config, ["--allowed_folders", "/", "gone", "--data", "mine.jsonl"])
    for config_class in (Config, EvaluateConfig):
        config = read_config(config_class, ["--allowed_folders", str(tmp_path), "/"])
        assert config.data_arguments()["allowed_folders"] == [str(tmp_path), "/"]


@pytest.mark.parametrize("suffix", ["eps", "png"])
def test_postscript_is_not_given_to_ghostscript(tmp_path, suffix, monkeypatch):
    """Pillow reads EPS by running Ghostscript, a programming language, on it, whatever the file is called."""
    Image.new("RGB", (WIDTH, HEIGHT), "red").save(tmp_path / f"a.{suffix}", "EPS")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments, **options: pytest.fail("it was run"))
    with pytest.raises(DataError, match="cannot identify its format; .* PNG, JPEG, WEBP"):
        load_picture(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("kind", "PNG JPEG WEBP GIF BMP TIFF PPM JPEG2000 ICO TGA PCX SGI".split())
def test_the_formats_of_photographs_and_drawings_are_read(tmp_path, kind):
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "a.bin", kind)
    red, green, blue = load_picture(tmp_path / "a.bin").getpixel((16, 16))
    assert red < 9 and green < 9 and blue > 246


def test_a_pipe_called_picture_does_not_stop_everything(folder):
    os.mkfifo(folder / "pipe.png")
    began = time.monotonic()
    for path in ("pipe.png", "/dev/zero"):
        with pytest.raises(DataError, match="cannot be read: it is a pipe or a device"):
            load_examples(write_jsonl(folder, GOOD | {"image": path}), allowed_folders=["/"])
    assert time.monotonic() - began < 20


def test_large_pictures_are_decoded_one_at_a_time(folder, monkeypatch):
    """Eight threads with a mask of 178 megapixels each, 170 kB on the disk, took several gigabytes."""
    monkeypatch.setattr(pictures, "LARGE", WIDTH * HEIGHT - 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    to_mask, inside, most = pictures._to_mask, [], []

    def slow(opened):
        inside.append(1)
        most.append((len(inside), threading.active_count()))
        time.sleep(0.02)
        found = to_mask(opened)
        inside.pop()
        return found

    monkeypatch.setattr(pictures, "_to_mask", slow)
    for number in range(8):
        Image.new("L", (WIDTH, HEIGHT), 10 + number).save(folder / f"mask{number}.png")
    assert len(load_examples(write_jsonl(folder, *(GOOD | {"mask": f"mask{number}.png"} for number in range(8))))) == 8
    assert max(count for count, _ in most) == 1 and max(threads for _, threads in most) > 2


def test_the_pictures_of_one_row_are_bounded_together(folder, monkeypatch):
    monkeypatch.setattr("sayo.examples.checks.MAX_PIXELS_OF_ROW", 3 * WIDTH * HEIGHT)
    assert len(load_examples(write_jsonl(folder, two([[[1, 1, 9, 9]], [], []], images=["a.png"] * 3)))) == 1
    with pytest.raises(DataError, match="4 pictures of 4800 pixels in all; shrink them to 3600 or less"):
        load_examples(write_jsonl(folder, two([[[1, 1, 9, 9]], [], [], []], images=["a.png"] * 4)))


def test_a_key_that_is_given_twice_is_named(folder):
    """Python takes the last one: boxes of one author, silently, over those of another."""
    line = json.dumps(GOOD)[:-1] + ', "boxes": [[1, 1, 2, 2]]}'
    for name, text in (("a.jsonl", line), ("a.json", f"[{line}]")):
        (folder / name).write_text(text)
        with pytest.raises(DataError, match="not JSON .*key 'boxes' twice in one object"):
            load_examples(str(folder / name))


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 9000, '{"a": ' * 100_000])
def test_jsonl_of_other_stages_that_nests_or_counts_without_end_is_named(tmp_path, line):
    (tmp_path / "rollouts.jsonl").write_text(f"{line}\n{{}}\n")
    with pytest.raises(ConfigError, match="line 1 is not JSON"):
        read_jsonl(tmp_path / "rollouts.jsonl")


LAUGHS = "a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]\n" for number in range(1, 12)
)
BAD_YAML = [
    ("billion laughs", LAUGHS + "data: *a11\n", "aliases"),
    ("one alias", "model: &a x\ndata: *a\n", "aliases"),
    ("merge", "<<: &a {model: x}\n", "unknown field '<<'"),
    ("list that holds itself", "fields: &a [*a]\n", "aliases"),
    ("Python object", "!!python/object/apply:os.system ['touch ran']\n", "tags"),
    ("tag of YAML", "max_steps: !!int x\n", "tags"),
    ("tag without a value", "max_steps: !!timestamp\n", "tags"),
    ("nested lists", "fields: " + "[" * 100_000, "nested more than 20"),
    ("nested lists, closed", "fields: " + "[" * 5000 + "]" * 5000, "nested more than 20"),
    ("nested keys", "{a: " * 100_000, "nested more than 20"),
    ("nested blocks", "".join(" " * depth + "a:\n" for depth in range(400)), "nested more than 20"),
    ("too large", "# " + "x" * LARGEST_FILE, "bytes"),
    ("digits without end", "max_steps: " + "9" * 9000, "max_steps"),
    ("no such day", "max_steps: 2026-99-99\n", "max_steps"),
    ("given twice", "beta: 0.1\nseed: 1\nbeta: 0.2\n", "'beta' is given twice"),
    ("list as a key", "? [a, b]\n: 1\n", "unhashable"),
    ("list for one value", "max_steps: [1, 2]\n", "max_steps: .*give one value"),
    ("mapping for one value", "data: {a: b}\n", "data: .*give one value"),
    ("lists in a list", "fields: [[question=query]]\n", "fields: .*give a list"),
    ("null in a list", "fields: [null]\n", "fields: .*give a list"),
    ("empty list", "fields: []\n", "fields: .*give a list"),
    ("a flag in a list", "fields: [question=query, --model=evil/model]\n", "'--model=evil/model' begins with a dash"),
    ("half a character", 'system_prompt: "\\ud83d"\n', "half of a character"),
    ("a zero", 'output_dir: "a\\0b"\n', "leave out the zero"),
    ("not UTF-8", b"model: \xff\xfe\n", "utf-8"),
    ("control characters", b"model: \x07\n", "special characters"),
    ("two documents", "seed: 1\n---\nseed: 2\n", "expected a single document"),
    ("many unknown fields", "".join(f"x{number}: 1\n" for number in range(4_000)), "and 3980 more unknown fields"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), [pytest.param(*case[1:], id=case[0]) for case in BAD_YAML])
def test_yaml_that_is_no_settings_is_one_short_message_at_once(tmp_path, text, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    began = time.monotonic()
    with pytest.raises(ConfigError, match=words) as raised:
        read_config(Config, ["--config", "run.yaml"])
    assert time.monotonic() - began < 60 and len(str(raised.value)) < 30_000
    assert not Path("ran").exists()


AS_WRITTEN = [  # field, text in YAML, value: YAML 1.1 takes 007 for 7, 12:30 for 750, no for False, 1_000 for 1000
    ("output_dir", "007", "007"), ("model", "12:30", "12:30"), ("system_prompt", "no", "no"),
    ("adapter", "1_000", "1_000"), ("revision", "2026-01-01", "2026-01-01"), ("resume", "yes", True),
    ("learning_rate", "1e-5", 1e-5), ("max_steps", "0010", 10), ("system_prompt", "'null'", "null"),
    ("system_prompt", "'~'", "~"), ("revision", "null", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "value"), AS_WRITTEN)
def test_values_in_yaml_stay_what_is_written(tmp_path, name, text, value):
    (tmp_path / "run.yaml").write_text(f"{name}: {text}\n", encoding="utf-8-sig")
    assert getattr(read_config(Config, ["--config", str(tmp_path / "run.yaml")]), name) == value


def test_settings_that_are_a_folder_or_have_an_impossible_name(tmp_path):
    for path in (str(tmp_path), "x" * 5000, "a\0b"):
        with pytest.raises(ConfigError, match="cannot be read as YAML"):
            read_config(Config, ["--config", path])


PATHS = [(Config, name) for name in "data model adapter output_dir eval_data allowed_folders revision".split()]
PATHS += [(EvaluateConfig, name) for name in "data model adapter output_dir revision".split()]
# Each was an OSError or a ValueError of the system, with a traceback, at some later place.
REFUSED = [(*path, value) for path in PATHS for value in ("x/" * 3000, "x" * 300, "a\0b", "a\ud83d")]
# Looking for os.path imports os: a name with a dot imported any package that is there, or failed.
REFUSED += [(Config, "report_to", value) for value in ("39.5", "no_such_package.module", "", ".x")]


@pytest.mark.parametrize(("config_class", "name", "value"), REFUSED)
def test_a_name_that_nothing_can_have_is_named_first(config_class, name, value):
    words = f"{value!r}: valid are" if name == "report_to" else ".*(so long a name|leave out the zero)"
    with pytest.raises(ConfigError, match=f"{name}={words}"):
        read_config(config_class, [f"--{name}", value])


def test_the_home_of_nobody_is_no_file(model_folders):
    with pytest.raises(DataError, match="there is no such file or folder"):
        load_examples("~nobody-of-that-name/rows.jsonl")
    with pytest.raises(PolicyError, match="is no folder, nor can it be downloaded"):
        load_policy(model_folders["qwen3_vl"], adapter="~nobody-of-that-name")
