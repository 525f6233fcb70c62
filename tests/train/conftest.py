"""A folder of pictures, and the shards prepared from it."""

import pytest

from tests.train.preparing import CLASSES, config, encoded


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of seven pictures, one of each in a subfolder; sorted by class and path they are 0, 1, ... 20."""
    root = tmp_path_factory.mktemp("folder")
    for label, name in enumerate(CLASSES):
        (root / name / "more").mkdir(parents=True)
        for i in range(7):
            place = root / name / ("more/z.png" if i == 6 else f"{i}.png")
            place.write_bytes(encoded(7 * label + i))
    (root / "ant" / "notes.txt").write_text("no picture")
    return root


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    from pmf.train.data.prepare import prepare  # needs the extra `data`

    out = tmp_path_factory.mktemp("prepared") / "shards"
    prepare(config(folder, out))
    return out
