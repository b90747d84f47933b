"""What perf.corpus takes out of a package."""

from perf.corpus import package_text


def test_pages_are_drawn_at_random_until_there_are_enough(tmp_path):
    for i in range(20):
        (tmp_path / f"page{i:02}.html").write_text(
            f"<html><head><title>x</title></head><body><p>page {i} {'word ' * 40}"
        )
    everything = package_text(tmp_path, "*.html", 10**6, seed=0)
    assert sorted(piece.split()[1] for piece in everything.split("\f")) == sorted(str(i) for i in range(20))
    some = package_text(tmp_path, "*.html", 500, seed=0)
    assert len(some) == 500
    assert everything.startswith(some)
    assert package_text(tmp_path, "*.html", 500, seed=1) != some
