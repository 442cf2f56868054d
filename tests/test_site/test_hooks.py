"""Links of documents are moved to where the site has what they name."""

import runpy

import pytest

HOOKS = runpy.run_path('docs/site/hooks.py')
move_links, place_of = HOOKS['move_links'], HOOKS['place_of']


@pytest.mark.parametrize(
    ('path', 'place'),
    [
        ('README.md', 'index.md'),
        ('docs/README.md', 'documents.md'),
        ('docs/faq.md', 'faq.md'),
        ('docs/images/step.png', 'images/step.png'),
        ('docs/site/api/core.md', 'api/core.md'),
        ('configs/man', 'methods/man.md'),
        ('configs/man/README.md', 'methods/man.md'),
        ('configs/end_to_end', 'files/configs/end_to_end.md'),
        ('man_mm/core/bank.py', 'files/man_mm/core/bank.py.md'),
        ('benchmarks/entry.schema.json', 'files/benchmarks/entry.schema.json'),
        ('no_such.py', None),
        ('../elsewhere', None),
    ],
)
def test_places(path, place):
    assert place_of(path) == place


def test_links_are_moved_except_in_code():
    text = (
        '[a](../man_mm/core/bank.py) [b](faq.md#memory) [c](#here) [d](https://x.y)\n'
        '![e](images/step.png) [f](../README.md#install) [g](no_such.md)\n'
        '```python\nx[0](faq.md)\n```\n[h](faq.md)'
    )
    assert move_links(text, 'docs/memory.md', 'folder/page.md') == (
        '[a](../files/man_mm/core/bank.py.md) [b](../faq.md#memory) [c](#here) '
        '[d](https://x.y)\n'
        '![e](../images/step.png) [f](../index.md#install) [g](../no_such.md)\n'
        '```python\nx[0](faq.md)\n```\n[h](../faq.md)'
    )


def test_a_section_that_the_readme_lacks_is_named():
    section_of = HOOKS['section_of']
    assert section_of('## A\na\n## B\nb\n', 'B') == '## B\nb\n'
    with pytest.raises(ValueError, match="no section 'C'"):
        section_of('## A\na\n## B\nb\n', 'C')
