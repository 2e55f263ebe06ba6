import pytest

from jaxbn._patterns import as_text, matches


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("BatchNorm_0", "BatchNorm_0"),
        ("*", "BatchNorm_0"),
        ("BatchNorm_?", "BatchNorm_0"),
        ("block_[12]/norm", "block_2/norm"),
        ("*/BatchNorm_0", "Block_3/BatchNorm_0"),
        ("backbone/**", "backbone/Block_0/BatchNorm_0"),
        ("backbone/**", "backbone/norm"),
        ("backbone/**", "backbone"),
        ("**/norm", "norm"),
        ("**/norm", "a/b/norm"),
        ("a/**/b/**/c", "a/b/b/c"),
        ("**", ""),
        ("**", "a/b/c"),
        ("*a*/b", "xay/b"),
    ],
)
def test_matches(pattern, path):
    assert matches(pattern, path)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("BatchNorm_0", "Block_0/BatchNorm_0"),
        ("*", "a/b"),
        ("*", ""),
        ("a*", "b/a"),
        ("a*c", "ab/c"),
        ("*/BatchNorm_0", "BatchNorm_0"),
        ("*/BatchNorm_0", "a/b/BatchNorm_0"),
        ("backbone/**", "backbone2/norm"),
        ("backbone/*", "backbone/Block_0/norm"),
        ("a/**/c", "a/b"),
        ("norm", "Norm"),
        ("", "a"),
    ],
)
def test_does_not_match(pattern, path):
    assert not matches(pattern, path)


def test_paths_have_names_and_indices():
    assert as_text(("blocks", 0, "norm")) == "blocks/0/norm"
    assert as_text(()) == ""
