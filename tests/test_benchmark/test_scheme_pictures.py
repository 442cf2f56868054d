"""Pictures of growth, over batches, configs and settings."""

from man_mm.benchmark import scheme_pictures
from man_mm.benchmark.records import (
    make_records,
    read_records,
    setting,
    write_records,
)
from man_mm.benchmark.scheme_pictures import draw_pictures


def test_growth_is_drawn_over_batches_or_configs(tmp_path):
    def records(config, batch):
        row = dict(peak=batch, seconds=[batch], flops=1, reference='local', cuda={})
        results = {name: row for name in ('end-to-end', 'local+micro=1')[:batch]}
        return make_records(results, f'{config}.py', (64, 64), batch)

    over_batch = records('a', 1) + records('a', 2) + records('b', 4)
    over_configs = records('b', 2) + records('a', 2)
    for number, rows in enumerate((over_batch, over_configs)):
        path = tmp_path / f'{number}.png'
        drawn = draw_pictures(rows, path)
        assert drawn == [path, tmp_path / f'{number}_growth.png']
        assert all(path.stat().st_size > 10_000 for path in drawn)


def test_growth_over_a_setting_has_a_line_for_all_values_of_k(tmp_path):
    row = dict(peak=1, seconds=[], flops=1, reference='local', cuda={})
    for depth in (16, 4, 256):
        results = {'end-to-end': row, f'local+K={depth // 4}': row}
        options = [f'model.depth={depth}', 'optim_wrapper.optimizer.lr=0.5']
        rows = make_records(results, 'a.py', (8, 8), 1, options=options)
        write_records(rows, tmp_path / str(depth))
    rows = read_records(tmp_path)
    names = list(dict.fromkeys(setting(row) for row in rows))
    assert names == [f'a, depth={depth}, lr=0.5' for depth in (4, 16, 256)]
    assert scheme_pictures._common(['a, d=1', 'a, d=2']) == ('a', ['d=1', 'd=2'])
    assert scheme_pictures._common(['a', 'b']) == ('', ['a', 'b'])
    lines = scheme_pictures._lines(rows)
    assert list(lines) == ['end-to-end', 'local+K=1,4,64']
    assert [len(line) for line in lines.values()] == [3, 3]
    drawn = draw_pictures(rows, tmp_path / 'depth.png')
    assert drawn == [tmp_path / 'depth_growth.png']
