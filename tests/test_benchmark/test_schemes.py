"""How schemes of `benchmark` are written."""

import pytest

from man_mm.benchmark import schemes


def test_schemes_are_parsed():
    parse = schemes.parse_scheme
    scheme = parse('local+K=4+recompute=a.b,c+no-bank')
    assert scheme.base == 'local'
    assert scheme.options == {'K': 4, 'recompute': ['a.b', 'c'], 'no-bank': True}
    assert parse('local+cuts=').options == {'cuts': []}
    assert parse('local').parts(4) == 1
    assert parse('local+accumulate=2').parts(4) == 2
    assert parse('local+accumulate=batch').parts(4) == 4


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('locally', ['not known', "'local'", 'K=N', 'in-backward']),
        ('local+shuffle', ['not known', 'micro=N', 'parameter|iteration|module']),
        ('local+stages+stages', ['not known', 'once']),
        ('end-to-end+micro=1', ['local, exact, joint training only']),
        ('local+in-backward', ['update=parameter']),
        ('exact+recompute-losses', ['losses-kept']),
        ('end-to-end+lean+recompute-losses', ['exclude each other']),
        ('local+K=2+stages', ['K and stages exclude each other']),
        ('end-to-end+bf16+fp16', ['bf16 and fp16 exclude each other']),
        ('local+K', ['write K=N']),
        ('local+K=0', ['write K=N']),
        ('local+K=batch', ['write K=N']),
        ('local+bits=16', ['write bits=8|4']),
        ('local+update=now', ['write update=parameter|iteration|module']),
        ('local+stages=4', ['write stages without a value']),
        ('local+cuts', ['write cuts=NAME,NAME']),
    ],
)
def test_schemes_that_make_no_sense(text, words):
    with pytest.raises(ValueError) as error:
        schemes.parse_scheme(text)
    assert all(word in str(error.value) for word in [repr(text), *words])
