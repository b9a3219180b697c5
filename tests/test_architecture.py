"""The picture of the architecture matches the code and is legible."""

import re
import xml.etree.ElementTree as ElementTree

from docs import architecture


def test_the_picture_is_up_to_date(capsys):
    status = architecture.main(["--check"])
    assert status == 0, capsys.readouterr().err


def test_an_outdated_picture_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(architecture, "OUT", tmp_path / "architecture.svg")
    assert architecture.main(["--check"]) == 1  # there is none
    assert architecture.main([]) == 0 == architecture.main(["--check"])
    architecture.OUT.write_text(architecture.OUT.read_text().replace("models.py", "model.py"))
    assert architecture.main(["--check"]) == 1
    assert capsys.readouterr().err.count("run python3 docs/architecture.py") == 2


def test_imports_that_follow_from_others_are_left_out():
    edges = {"a": {"b", "c", "d"}, "b": {"c"}, "c": {"d"}, "d": set()}
    assert architecture.reduced(edges) == {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": set()}


def test_every_part_has_a_box_and_no_two_boxes_overlap():
    layers = architecture.read_layers()
    root = ElementTree.fromstring(architecture.draw(layers))
    space = "{http://www.w3.org/2000/svg}"
    names = {re.sub(r"\.py$|/$", "", text.text) for text in root.iter(f"{space}text") if text.get("class") == "name"}
    assert names == set.union(*layers)
    boxes = [(float(box.get("x")), float(box.get("y"))) for box in root.iter(f"{space}rect")]
    assert all(0 <= x <= architecture.WIDTH - architecture.BOX for x, _ in boxes)
    for i, (x, y) in enumerate(boxes):
        assert all(abs(x - a) >= architecture.BOX or abs(y - b) >= architecture.HEIGHT for a, b in boxes[:i])
