"""Run: .venv/bin/python -m pytest tests/test_recipe.py"""

import pytest
import yaml

from rewardkit import checks, recipe, verbs
from rewardkit.errors import RewardkitError

LOOP = """# recipes/loop.yaml -- a pool that empties
needs: {data: labelled rows}
defaults: {rounds: 3, low: 0.5}
steps:
  - score:  {data: "{data}", reward: text kind=length, out: "{out}/0/scored"}
  - repeat: "{rounds}"
    steps:
      - filter: {data: "{out}/{i}/scored", rule: "threshold min={low}", out: "{out}/{i}/kept", dropped: "{out}/{i}/rest"}
      - score:  {name: again, data: "{out}/{i}/kept", reward: "%s:shorter", out: "{out}/{next}/scored"}
  - score: {data: "{out}/{last}/scored", reward: text kind=length, out: "{out}/end"}
"""


@pytest.fixture
def loop(tmp_path):
    (tmp_path / "mine.py").write_text("def shorter(rows):\n    return [r['score'] - 2 for r in rows]\n")
    file = tmp_path / "loop.yaml"
    file.write_text(LOOP.replace("{name: again, ", "{") % (tmp_path / "mine.py"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "xyz"}\n{"prompt": "b", "response": "x"}\n')
    return file, {"data": str(tmp_path / "rows.jsonl")}


def calls(file, given, out="o"):
    return [(s.verb, s.arguments) for s in recipe.steps(recipe.load(file), out, given)]


def test_variables_and_loops_unroll(loop):
    file, given = loop
    found = calls(file, given)
    assert [v for v, _ in found] == ["score", *["filter", "score"] * 3, "score"]
    assert found[3][1]["data"] == "o/1/scored" and found[4][1]["out"] == "o/2/scored"
    assert found[-1][1]["data"] == "o/3/scored" and found[1][1]["rule"] == "threshold min=0.5"
    assert len(calls(file, given | {"rounds": 1})) == 4


WAYS = """
needs: {data: rows}
defaults: {way: short, rounds: 2}
steps:
  - repeat: "{rounds}"
    steps:
      - only: {way: short}
        steps:
          - filter: {data: "{data}", rule: all, out: "{out}/{i}/short"}
      - only: {way: long}
        steps:
          - repeat: 1
            start: 7
            steps:
              - filter: {data: "{data}", rule: all, out: "{out}/{i}/long"}
"""


def test_only_the_steps_of_a_settings_value_are_taken(tmp_path):
    file = tmp_path / "ways.yaml"
    file.write_text(WAYS)
    assert [a["out"] for _, a in calls(file, {"data": "d"})] == ["o/0/short", "o/1/short"]
    assert [a["out"] for _, a in calls(file, {"data": "d", "way": "long", "rounds": "1"})] == ["o/7/long"]
    with pytest.raises(RewardkitError, match=r"unknown value of way in recipe 'ways' 'lung'.*\(valid: long, short\)"):
        calls(file, {"data": "d", "way": "lung"})


def test_a_loop_ends_when_its_filter_keeps_nothing(loop, tmp_path):
    """Lengths 3 and 1, each round 2 less: round 0 keeps both, round 1 one, round 2 none."""
    file, given = loop
    out = verbs.train(str(file), str(tmp_path / "out"), **given)
    made = sorted(str(p.parent.relative_to(out)) for p in out.rglob("manifest.json"))
    assert made == [".", "0/kept", "0/rest", "0/scored", "1/kept", "1/rest", "1/scored", "2/kept", "2/rest", "2/scored", "end"]
    assert recipe.read_manifest(out / "end")["inputs"]["data"]["path"] == f"{out}/2/scored"
    assert recipe.read_manifest(out)["steps"][-1] == f"{out}/end"


def test_a_finished_recipe_is_skipped_and_a_broken_one_continues(loop, tmp_path):
    file, given = loop
    out = verbs.train(str(file), str(tmp_path / "out"), **given)
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    verbs.train(str(file), str(out), **given)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == times
    (out / "manifest.json").rename(out / "unfinished.json")
    for name in ("end/manifest.json", "end/part-00000.parquet"):
        (out / name).unlink()
    verbs.train(str(file), str(out), **given)
    changed = {p.name for p in out.rglob("*") if p.is_file() and times.get(p) != p.stat().st_mtime_ns}
    assert changed == {"manifest.json", "part-00000.parquet"} and (out / "end/manifest.json").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("text kind=length, out", "tex kind=length, out"), "unknown reward 'tex'; did you mean 'text'?"),
        (("rule: ", "rul: "), "unknown argument of `filter` in recipe 'loop' 'rul'; did you mean 'rule'?"),
        (("- filter", "- fliter"), "unknown verb in recipe 'loop' 'fliter'; did you mean 'filter'?"),
        (("{last}/scored", "{lst}/scored"), "unknown variable in recipe 'loop' 'lst'; did you mean 'last'?"),
        (("{last}/scored", "elsewhere"), "`score` reads o/elsewhere, which no earlier step makes"),
        (("defaults", "default"), "'default'; did you mean 'defaults'?"),
        (("  - score:  {data: \"{data}\"", "  - score:  {data: nowhere.jsonl"), "there is no file or folder nowhere.jsonl"),
        (("steps:\n  - score", "method: [\n  - score"), "is not YAML"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_runs(loop, change, says):
    file, given = loop
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(RewardkitError) as error:
        recipe.check(recipe.load(file), "o", given, verbs.VERBS, checks.CHECKS)
    assert says in str(error.value)


def test_settings_are_checked(loop):
    file, given = loop
    loaded = recipe.load(file)
    for settings, says in [
        ({}, "needs data=... (labelled rows)"),
        (given | {"rouns": 2}, "did you mean 'rounds'?"),
        (given | {"sft.epochs": 2}, "unknown step"),
    ]:
        with pytest.raises(RewardkitError) as error:
            recipe.check(loaded, "o", settings, verbs.VERBS, checks.CHECKS)
        assert says in str(error.value)


def test_a_number_from_the_shell_is_a_number_to_the_verb(loop, tmp_path):
    _, given = loop
    file = tmp_path / "two.yaml"
    file.write_text("needs: {data: rows}\ndefaults: {n: 1}\nsteps:\n  - generate: {model: scripted, prompts: '{data}', n: '{n}', "
                    "max_tokens: 4, engine: scripted reply=yes, out: '{out}/said'}\n")  # fmt: skip
    out = verbs.train(str(file), str(tmp_path / "out"), **given, n=recipe.read_value("2"))
    assert recipe.read_manifest(out / "said")["rows"]["out"] == 4
    with pytest.raises(RewardkitError, match="n of `generate`"):
        verbs.train(str(file), str(tmp_path / "other"), **given, n="many")


def test_a_dotted_setting_reaches_named_steps_and_leaf_recipes(tmp_path):
    steps = [
        {"train": {"recipe": "sft", "model": "m", "data": "d", "out": "{out}/a"}, "name": "first"},
        {"train": {"recipe": "sft", "model": "m", "data": "d", "out": "{out}/b"}},
    ]
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"steps": steps}))
    found = calls(tmp_path / "two.yaml", {"sft.epochs": 3, "first.seed": 1})
    assert [(a["epochs"], a.get("seed")) for _, a in found] == [(3, 1), (3, None)]


@pytest.mark.parametrize("name", sorted(recipe.names()))
def test_shipped_recipes_describe_every_setting(name):
    loaded = recipe.load(name)
    assert loaded.about and all(meaning for _, _, meaning in recipe.describe(loaded))
    if loaded.method:
        given = dict.fromkeys(loaded.needs, "x")
        assert checks.method(loaded, given)[1]
