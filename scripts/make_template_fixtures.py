"""writes test/fixtures/templates.json: small chat templates, and what transformers makes of them

    python3 make_template_fixtures.py

Each case has a template, with options a conversation, and the text that `render_jinja_template` gives, or null where it
raises. `contents`: conversations of texts and of lists of parts, with what it gives for
the form that the template shows. Needs transformers.
"""

import json
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

TARGET = Path(__file__).parent.parent / "test/fixtures/templates.json"

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"b": 1, "a": [1.5, None, True]}}}
MESSAGES = [
    {"role": "system", "content": "  Be kind.\n"},
    {"role": "user", "content": "Hé <b> & \"it's\" 🙂\tx"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "name": "add"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds é", "parameters": {
    "type": "object", "properties": {"b": {"type": "number"}, "a": {"type": "array"}}, "required": ["a", "b"]}}}]

# Expressions, one a line.
EXPRESSIONS = r"""
1 + 2 * 3 ** 2
2 ** 3 ** 2
-2 ** 2
-3 // 2 ~ ' ' ~ -3 % 2 ~ ' ' ~ 7 // 2 ~ ' ' ~ 7 % -3
7 / 2 ~ ' ' ~ 6 / 3 ~ ' ' ~ 1 / 3
7.5 // 2 ~ ' ' ~ -7.5 // 2 ~ ' ' ~ 7.5 % -2 ~ ' ' ~ -7.5 % 2
2 ** -1 ~ ' ' ~ 2.0 ** 0.5 ~ ' ' ~ 0 ** 0
1 / 0
1 % 0
1e16 ~ ' ' ~ 1e15 ~ ' ' ~ 1e-4 ~ ' ' ~ 1e-5 ~ ' ' ~ 1.5e300 ~ ' ' ~ 0.1 + 0.2 ~ ' ' ~ 100.0 ~ ' ' ~ 1e22
1_000 ~ ' ' ~ 0x1F ~ ' ' ~ 0b101 ~ ' ' ~ 0o17 ~ ' ' ~ 1_0.5_0
true ~ false ~ none ~ True ~ False ~ None
[true, none, 1, 1.0, 'a', "it's", 'say "x"', 'both \' and "', [], {}, (), (1,), (1, 2)]
{'a': 1, 1: 'x', none: true, 1.5: [1], (1, 2): 'y'}
{'a': 1, 'b': 2, 'a': 3}
{1: 'a', 1.0: 'b', true: 'c'}
'tab\there' ~ 'nl\nx' ~ 'back\\slash'
['tab\t', 'nl\n', 'cr\r', '\\', '\x00\x7f', 'é', '\u200b', '\xa0', '\U0001F600', '\u3000', '\ud7ff']
'\x41\u00e9\U0001F600\101\0'
'\q\d\é'
'a' 'b' "c"
"a" + "b" * 3 + 2 * "c"
[1] + [2, 3] * 2 + 2 * [4]
(1,) + (2,) * 2
'a' * -1 ~ [1] * 0
'a' + 1
1 + 'a'
'a' ~ 1 ~ none ~ undefined ~ [1]
'%s and %d and %5.2f|%-5s|%5s|%05d|%x|%X|%o|%e|%g|%%|%r|%c' % ('a', 42, 3.14159, 'l', 'r', 7, 255, 255, 8, 12345.678, 0.0001, "q'", 'z')
'%(a)s-%(b)03d' % {'a': 'x', 'b': 5}
'%s' % [1, 2]
'%s' % ('only',)
'%s %s' % 'one'
'no' % 1
'%d' % 3.99
'%s' % none
'%+d % d %+.1f' % (3, 4, 2.55)
'%*d|%-*d|' % (5, 42, 5, 42)
'%.2s|%10.3f|%a' % ('abcdef', 2.5, 'é')
'%i' % 'x'
1 < 2 < 3
1 < 2 > 3
1 == 1.0
1 == true
'a' < 'b'
'a' < 1
[1, 2] < [1, 3]
[1] == (1,)
{'a': 1, 'b': 2} == {'b': 2, 'a': 1}
none == undefined
undefined == nope
none < 1
1 in [1, 2]
'a' in 'abc'
'x' not in 'abc'
'a' in {'a': 1}
1 in 'abc'
1 in none
'x' in nope
1 in range(3)
not 1 == 2
not true and false
1 and 2
0 or 'x'
'' or none
1 if false
(1 if false) is defined
1 if true else 2
'a' if 0 else 'b' if 0 else 'c'
messages[0].role
messages[-1]['role']
messages[10]
messages[10].role
messages[0]['nope']
messages[0].nope
messages[0].nope.x
nope
nope.x
nope['x']
nope()
nope + 1
-nope
nope | length
nope | list
messages | length
messages[0].items
messages[0].items() | list
messages[0].keys() | list
messages[0].values() | list
messages[0].keys()
messages[0].items()
messages[0].get('role')
messages[0].get('x')
messages[0].get('x', 'd')
messages[0].pop('role')
messages.append(1)
messages[0].update({'a': 1})
messages[0].__class__
messages.__len__()
messages[0]['__class__']
messages[1:3] | map(attribute='role') | list
messages[::-1] | map(attribute='role') | join(',')
messages[-2:] | map(attribute='role') | join(',')
messages[:-1] | length
messages[5:] | length
[1, 2, 3, 4, 5][::2]
[1, 2, 3, 4, 5][4:1:-1]
[1, 2, 3, 4, 5][-1:-10:-2]
[1, 2, 3][0:0]
[1, 2, 3][::0]
(1, 2, 3)[1:]
'abcdef'[1:-1]
'abcdef'[::-1]
'héllo🙂'[1]
'héllo🙂'[-1]
'héllo🙂'[1:3]
'abc'[10]
range(5)
range(5) | list
range(1, 10, 3) | list
range(10, 0, -3) | list
range(5)[1:3]
range(5)[-1]
range(200000)
range(0)
none.x
none['x']
5 .x
'abc'.nope
'abc'.upper
'  ab '.strip() ~ '|' ~ '  ab '.lstrip() ~ '|' ~ '  ab '.rstrip() ~ '|'
'xxabxx'.strip('x') ~ 'xyabyx'.strip('yx') ~ 'aab'.lstrip('a') ~ 'baa'.rstrip('a')
'\x1c a \x1f'.strip()
'a,b,c'.split(',')
'a,b,c'.split(',', 1)
'a,b,c'.rsplit(',', 1)
'a b  c'.split()
'  a b  c '.split(none, 1)
'  a b  c '.rsplit(none, 1)
'  a b  c '.split(maxsplit=1)
'a b'.split(sep=' ')
''.split()
''.split(',')
'abc'.split('')
'a\nb\r\nc\x0bd'.splitlines()
'a\nb\r\n'.splitlines(true)
'a\n\nb'.splitlines(keepends=true)
'a-b-c'.partition('-')
'a-b-c'.rpartition('-')
'abc'.partition('-')
'abc'.rpartition('-')
'prefix_x'.removeprefix('prefix_')
'x_suffix'.removesuffix('_suffix')
'hello wORLD it\'s'.title()
'hELLO'.capitalize()
'éCOLE'.capitalize()
'ßx'.upper() ~ 'ßx'.capitalize() ~ 'ßx'.title()
'HeLLo'.swapcase()
'HELLO ß'.casefold()
'123'.isdigit() ~ '12a'.isdigit() ~ ''.isdigit() ~ '²'.isdigit() ~ '½'.isdigit() ~ '½'.isnumeric() ~ '²'.isdecimal()
'abc'.isalpha() ~ 'ab1'.isalpha() ~ 'ab1'.isalnum() ~ 'é'.isalpha() ~ '漢'.isalpha()
'Abc'.istitle() ~ 'abc'.islower() ~ 'ABC'.isupper() ~ '1a'.islower() ~ ' \t'.isspace() ~ ''.isspace()
'a_1'.isidentifier() ~ '1a'.isidentifier() ~ 'a b'.isprintable() ~ 'a\n'.isprintable() ~ 'é'.isascii()
'42'.zfill(5) ~ '-42'.zfill(5) ~ '+4'.zfill(1)
'ab'.center(7, '*') ~ '|' ~ 'abc'.center(6) ~ '|' ~ 'ab'.ljust(4, '.') ~ 'ab'.rjust(4)
'a\tb'.expandtabs() ~ 'a\tb'.expandtabs(4)
'banana'.find('an') ~ 'banana'.rfind('an') ~ 'banana'.find('x') ~ 'banana'.find('an', 2) ~ 'banana'.find('a', -2)
'banana'.index('n') ~ 'banana'.count('a') ~ 'banana'.count('ana') ~ 'banana'.count('')
'banana'.index('x')
'banana'.replace('a', 'o') ~ 'banana'.replace('a', 'o', 1) ~ 'abc'.replace('', '-')
'abc'.startswith('a') ~ 'abc'.startswith(('x', 'ab')) ~ 'abc'.endswith('c') ~ 'abc'.endswith(('x', 'y')) ~ 'abc'.startswith('b', 1)
'abc'.startswith(['a'])
', '.join(['a', 'b']) ~ '-'.join('abc')
', '.join([1, 2])
'{} {}'.format('a', 1) ~ '{0}{1}{0}'.format('x', 'y') ~ '{a}'.format(a=2) ~ '{{}}'.format()
'{:>5}|{:<5}|{:^5}|{:*^7}|{:05d}|{:,}|{:.2f}|{:+d}|{:x}|{:#x}|{:b}|{:e}|{:%}|{:g}'.format('a', 'b', 'c', 'd', 42, 1234567, 3.14159, 5, 255, 255, 5, 1234.5, 0.256, 1e10)
'{!r} {!s:>4} {0[a]} {0.role}'.format({'a': 1})
'{0[role]} {0.role}'.format(messages[0])
'{:{}}|'.format('x', 5)
'{}'.format()
'{x}'.format_map({'x': 1})
[3, 1, 2].index(1) ~ [1, 1].count(1) ~ (1, 2).index(2)
[1].index(5)
'abc' | upper ~ ('ABC' | lower) ~ ('abc' | capitalize) ~ ('hello wORLD-foo (bar) it\'s' | title)
' a ' | trim ~ '|' ~ ('xax' | trim('x'))
[1, 2] | join ~ ([1, 'a', none] | join(', ')) ~ ('abc' | join('-'))
messages | join(',', attribute='role')
[] | first ~ '|' ~ ([1, 2] | first) ~ ([1, 2] | last) ~ ('abc' | first) ~ ('abc' | last)
nope | default('d') ~ ('' | default('d')) ~ ('' | default('d', true)) ~ (none | d('x')) ~ (0 | default('z', boolean=true))
[3, 1, 2] | sort ~ ([3, 1, 2] | sort(reverse=true)) ~ (['b', 'A', 'c'] | sort) ~ (['b', 'A', 'c'] | sort(case_sensitive=true))
messages | sort(attribute='role') | map(attribute='role') | list
messages | sort(attribute='role,content') | map(attribute='role') | list
[1, 'a'] | sort
{'b': 1, 'a': 2, 'C': 0} | dictsort ~ ({'b': 1, 'a': 2} | dictsort(by='value')) ~ ({'b': 1, 'a': 2} | dictsort(reverse=true))
[1, 2, 1, 'a', 'A'] | unique | list
[3, 1, 2] | min ~ ([3, 1, 2] | max) ~ (['b', 'A'] | min) ~ ([] | max)
messages | max(attribute='role') | string
[1, 2, 3] | sum ~ ([1.5, 2] | sum) ~ ([[1], [2]] | sum(start=[])) ~ ([{'a': 1}, {'a': 2}] | sum(attribute='a'))
messages | groupby('role') | map(attribute='grouper') | list
messages | groupby('role') | map('last') | map('length') | list
[1, 2, 3, 4, 5] | batch(2) | list ~ ([1, 2, 3] | batch(2, 'x') | list) ~ ([1, 2, 3, 4, 5] | slice(2) | list) ~ ([1, 2, 3] | slice(2, 'x') | list)
[1, 2, 3] | reverse | list ~ ('abc' | reverse)
[1, 2, 3] | select('odd') | list ~ ([1, 2, 3] | reject('odd') | list) ~ ([0, 1, '', 'a'] | select | list) ~ ([1, 2, 3] | select('>', 1) | list)
messages | selectattr('role', 'equalto', 'user') | list | length
messages | selectattr('role', '==', 'user') | map(attribute='content') | first
messages | rejectattr('tool_calls') | map(attribute='role') | join(',')
messages | selectattr('tool_calls', 'defined') | list | length
messages | selectattr('role', 'in', ['user', 'tool']) | map(attribute='role') | list
['a', 'b'] | map('upper') | join ~ ([1, 2] | map('string') | list) ~ ([[1, 2], [3]] | map('length') | list) ~ (['a b'] | map('replace', ' ', '_') | list)
[{'a': 1}, {}] | map(attribute='a', default='x') | list
[{'a': {'b': 1}}] | map(attribute='a.b') | list
[[1, 2], [3, 4]] | map(attribute=0) | list
[1, 2] | map('upper')  is defined
'abc' | length ~ ({'a': 1} | length) ~ ('é🙂' | count)
-5 | abs ~ (-2.5 | abs) ~ ('12' | int) ~ ('12.7' | int) ~ ('x' | int) ~ ('x' | int(5)) ~ ('0x1f' | int(base=16)) ~ (3.99 | int) ~ (none | int)
'1.5' | float ~ ('x' | float) ~ (3 | float) ~ ('1e3' | float) ~ ('x' | float(2.5))
2.567 | round(2) ~ (2.5 | round) ~ (3.5 | round) ~ (2.1 | round(0, 'ceil')) ~ (2.9 | round(method='floor')) ~ (1234 | round(-2)) ~ (2 | round)
'a b c' | wordcount ~ ('hello world' | truncate(8)) ~ ('hello world foo' | truncate(11, true, '..', 0)) ~ ('abc' | truncate(5))
'a\nb\n\nc' | indent ~ '|' ~ ('a\nb' | indent(2, true)) ~ '|' ~ ('a\n\nb' | indent(2, blank=true)) ~ '|' ~ ('a\nb' | indent('> '))
'%s-%s' | format('a', 1) ~ ('%(x)s' | format(x=2))
'abc' | center(9) ~ '|' ~ ('aXbX' | replace('X', '-')) ~ ('aXbX' | replace('X', '-', 1)) ~ (112 | replace(1, 2))
'<a href="x">it\'s &</a>' | escape
'<p>a  <b>b</b></p>' | striptags
'a b/c?d=é' | urlencode ~ ({'a': 'b c', 'd': '/'} | urlencode)
1 | filesizeformat ~ (1000 | filesizeformat) ~ (1234567 | filesizeformat) ~ (1024 | filesizeformat(true))
{'a': 1, 'b': 2} | items | list ~ (nope | items | list)
{'b': 1, 'a': [1, 2]} | pprint
{'long key number one': 'x' * 30, 'another long key': ['y' * 30, 'z' * 30], 'c': {'nested': 'w' * 60}} | pprint
'word ' * 30 | string | pprint
'abc' | list ~ ({'a': 1} | list) ~ ((1, 2) | list)
1 | string ~ (none | string) ~ (1.0 | string) ~ ([1] | string)
'<' | safe
messages[0] | attr('items') is callable
messages | tojson
messages[2].tool_calls | tojson(indent=2)
tools | tojson
tools | tojson(indent=4)
tools[0] | tojson(sort_keys=true)
{'b': 1, 'a': [1, 2]} | tojson(separators=(',', ':'))
{'b': 1, 'a': []} | tojson(indent=2, separators=(', ', ' = '))
'é🙂"\n\\/\x01\x7f' | tojson ~ ('é🙂\x7f' | tojson(ensure_ascii=true)) ~ ('é' | tojson(true))
{'a': {}, 'b': [], 'c': [[]]} | tojson(indent=2)
[1, 1.0, 1e20, true, none, 'x', (1, 2)] | tojson
[1] | tojson(indent='--')
[1, [2]] | tojson(indent=0)
{1: 2, true: 3, none: 4, 1.5: 5} | tojson
{(1, 2): 3} | tojson
nope | tojson
messages[0].items() | tojson
range(3) | tojson
messages[0].keys() | list | tojson
1 is odd ~ (2 is even) ~ (6 is divisibleby 3) ~ (6 is divisibleby(4))
nope is defined ~ (nope is undefined) ~ (messages is defined) ~ (none is none) ~ (tools is none) ~ (documents is none) ~ (documents is defined)
true is boolean ~ (1 is boolean) ~ (1 is integer) ~ (true is integer) ~ (1.0 is float) ~ (1 is number) ~ (true is number) ~ (true is true) ~ (1 is true) ~ (false is false)
'a' is string ~ ({} is mapping) ~ ([] is sequence) ~ ('a' is sequence) ~ ({} is sequence) ~ (1 is sequence) ~ ([] is iterable) ~ (1 is iterable) ~ ('a' is iterable) ~ (range is callable) ~ (messages[0].items() is sequence) ~ (messages[0].items() is iterable) ~ (messages[0].items() is mapping)
nope is sequence ~ (nope is iterable) ~ (nope is string) ~ (nope is mapping) ~ (nope is none)
'a' is in ['a'] ~ ('a' is lower) ~ ('A' is upper) ~ (1 is eq 1) ~ (1 is ne 2) ~ (1 is lt 2) ~ (1 is sameas 1) ~ (none is sameas none)
1 is not odd ~ (1 is not none)
'upper' is filter ~ ('nope' is filter) ~ ('odd' is test)
namespace(a=1, b=[2])
namespace({'a': 1}, b=2).b
namespace(_a=1)
dict(a=1, b=2) ~ dict({'x': 1}, y=2) ~ dict([('k', 'v')])
raise_exception('no')
strftime_now('%%') ~ strftime_now('literal')
messages | map(attribute='role') | list | tojson
messages | first | string
(messages | selectattr('role', 'equalto', 'nobody') | first) is defined
messages | map(attribute='role') is string
none | selectattr('type', 'equalto', 'x') | list
none | map('upper') | list ~ (false | map(attribute='a') | list) ~ (0 | select | list) ~ (0.0 | reject('odd') | list)
none | rejectattr('a') | list | length > 0
none | map('nope') | list ~ ('' | select('nope') | list) ~ ([] | map | list) ~ (nope | selectattr('a') | list)
true | map('upper') | list
'<b>'|safe + '<i>' ~ ('<i>' + '<b>'|safe) ~ ('&'|safe + '&'|e) ~ ('"' + "'"|safe + {'a': '<'} | tojson)
('<b>'|safe + 1)
('<b>'|safe ~ '<i>') ~ ['<b>'|safe, '<i>'] | join('&') ~ ('<b>'|safe * 2 + '<') ~ (2 * '<b>'|safe + '<')
'%s|%r|%d|%5s|%s' % ('<', '<', 3, '<', [1, '<']) ~ ('%s|%r|%d|%5s|%s|%.1f|%s' | safe) % ('<', '<', 3, '<', [1, '<'], 2.5, none)
('%(a)s' | safe) % {'a': '<'} ~ ('%s' | safe) % ('<'|safe,) ~ '%s' % ('<'|safe,) ~ ('%s' | safe) % '<'
('{}{:>4}{a}{!r}{:.1f}' | safe).format('<', '<', '<', 2.5, a='&') ~ '{}'.format('<'|safe) ~ ('{}' | safe).format('<'|safe)
('{:>4}' | safe).format('<'|safe)
('{a}' | safe).format_map({'a': '<'})
('<' | safe).join(['<', 'a'|safe, 1]) ~ '<'.join(['<'|safe])
('a<b<c' | safe).split('<') ~ ('a b' | safe).rsplit() ~ ('a\nb' | safe).splitlines() ~ ('a<b' | safe).partition('<')
('abc' | safe).replace('b', '<') ~ ('abc' | safe) | replace('b', '<') ~ ('a' | safe).center(3, '<') ~ ('a' | safe).ljust(3, '<')
['a'|safe] ~ {'k': '<'|safe} ~ ['<'|e] ~ ['<'|e|e] ~ ['<'|safe|e] ~ ['<'|forceescape] ~ ['<'|safe|forceescape]
['a'|safe|upper, 'a'|safe|trim, 'A'|safe|lower, 'a'|safe|capitalize, 'a'|safe|title, 'a'|safe|center(3), 'a'|safe|string, 'a'|safe|replace('a', 'b')]
['a\nb'|safe|indent('<'), 'aaaa bbbb'|safe|truncate(5, true, '<', 0), 'aaaa bbbb'|safe|truncate(5, end='<', leeway=0), 'abc'|safe|reverse, '%s'|safe|format('<'), 'a b'|safe|striptags, 'a b'|safe|urlencode, 'a'|safe|tojson]
['abc'|safe|first, ('abc'|safe)[0], ('abc'|safe)[1:], ('abc'|safe)[::-1], 'abc'|safe|list, ('abc'|safe).upper(), ('abc'|safe).strip(), ('abc'|safe).removeprefix('a'), ('abc'|safe).zfill(5), ('abc'|safe).title(), ('abc'|safe).find('b')]
('a'|safe) is escaped ~ ('a' is escaped) ~ ('a'|e is escaped) ~ (('a'|safe + 'b') is escaped) ~ (('a'|safe ~ 'b') is escaped) ~ (('a'|safe) is string) ~ (1|safe is escaped)
('a'|safe == 'a') ~ ('a' in ['a'|safe]) ~ {'a': 1}['a'|safe] ~ ('a'|safe < 'b') ~ ('b' in 'abc'|safe) ~ ('12'|safe|int)
messages[0][('role'|safe)] ~ {'a'|safe: 1} ~ (nope|safe) ~ (none|safe) ~ ([1, '<']|safe) ~ (none|e) ~ (['<']|e) ~ ('<'|safe|pprint)
[('<b>'|safe, 'a')] | map('last') | list ~ (['<', 'a'] | map('safe') | list) ~ (['<', 'a'] | map('e') | join)
{'a': 'x'|safe} | tojson ~ ('<'|safe if true else '') + '<' ~ ('' | default('<'|safe, true) + '<')
1 | select | list
[messages[0].role, messages[1].role] | join(' and ') | upper
'a,b' .split(',') [0]
'x'.join(['a', 'b']) | length
messages[0].content | trim | upper
(messages[0].content | trim).split(' ')[-1]
messages[1].content | tojson
messages[2].tool_calls[0].function.arguments.items() | list
messages[2]['tool_calls'][0]['function']['arguments']['a'][0]
messages | string
{'a': 'é', 'b': '🙂'} | string
messages.0.role
1.5 is number and 1.5 is not integer
(1, 2) == (1, 2)
[] is none or not []
1, 2
loop
caller
2 if messages else 3
{'a': {'b': {'c': 1}}}['a']['b'].c
'a' ~ 'b' if true else 'c'
(1 if 0 else 2) + 1
5 // 2 * 2 + 5 % 2
10 - 2 - 3
2 * 3 % 4
'a' == 'a' and 'b' == 'b' or false
not not 1
+5 ~ -5 ~ --5
+'a'
"a" in ["a"] and "b" not in ["a"]
[1,2,3,]
{'a':1,}
foo(1)
messages[0].role.upper().lower().title()
'a' | upper | lower | replace('a', 'b') | default('c')
'abc'[0] ~ 'abc'[-1] ~ 'abc'['x']
{'x': none}.x is none
{'x': 1}.get('x') + 1
""".strip().split("\n")

# What needs statements.
TEMPLATES = [
    "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.cycle('a', 'b') }}{{ m.role }} {% endfor %}",
    "{% for m in messages %}{{ loop.previtem.role }}>{{ loop.nextitem.role if not loop.last }};{% endfor %}",
    "{% for m in messages if m.role != 'tool' %}{{ loop.index }}/{{ loop.length }}{{ m.role }} {% endfor %}",
    "{% for x in [] %}a{% else %}none{% endfor %}",
    "{% for a, b in {'x': 1, 'y': 2}.items() %}{{ a }}{{ b }}{% endfor %}",
    "{% for (a, b) in [(1, 2), (3, 4)] %}{{ a }}{{ b }}{% endfor %}",
    "{% for a, (b, c) in [(1, (2, 3))] %}{{ a }}{{ b }}{{ c }}{% endfor %}",
    "{% for a, b in [(1, 2, 3)] %}{{ a }}{% endfor %}",
    "{% for k in {'x': 1} %}{{ k }}{% endfor %}{% for c in 'héy' %}{{ c }}.{% endfor %}{% for i in 1, 2 %}{{ i }}{% endfor %}",
    "{% for x in 5 %}{% endfor %}",
    "{% for x in none %}{% endfor %}",
    "{% for x in nope %}a{% else %}b{% endfor %}",
    "{% for i in range(10) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% for i in [1, 2] %}{% for j in [1, 2] %}{{ loop.index }}{% if j == 1 %}{% break %}{% endif %}{% endfor %}{{ loop.index }};{% endfor %}",
    "{% set x = 1 %}{% for i in [1, 2] %}{{ x }}{% set x = 5 %}{{ x }}{% endfor %}{{ x }}",
    "{% set x = 1 %}{% if true %}{% set x = 2 %}{% endif %}{{ x }}",
    "{% if false %}{% set y = 1 %}{% endif %}{{ y is defined }}",
    "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.found = true %}{% endif %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.found }}{{ ns.n }}",
    "{% set ns = namespace() %}{% set ns.a = 1 %}{{ ns.a }}{{ ns.b is defined }}{{ ns }}",
    "{% set ns = namespace() %}{% set ns._a = 1 %}",
    "{% set x %}<b>{% endset %}{{ x + '<' }}{% macro f(a) %}<{{ a }}{% endmacro %}{{ f('<' | safe) + '<' }}{% filter safe %}<b>{% endfilter %}{% set y = '<b>' | safe %}{% for c in ['<', '>'] %}{{ y + c }}{% endfor %}",
    "{% for t in tools %}{{ \"Use '\" | safe + t.function.name + \"'\\n\" | safe + t.function | tojson }}{% endfor %}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set c = 1, 2 %}{{ c }}",
    "{% set ns = namespace() %}{% set ns.a, x = 1, 2 %}{{ ns.a }}{{ x }}",
    "{% set m = {} %}{% set m.a = 1 %}",
    "{% set x %}a{{ 1 }}b{% endset %}{{ x }}{{ x is string }}",
    "{% set x | upper | replace('A', 'z') %}a{% endset %}{{ x }}",
    "{% filter upper %}a{{ 'b' }}{% endfilter %}{% filter replace('a', 'b') | upper %}aa{% endfilter %}",
    "{% with a = 1, b = 2 %}{{ a }}{{ b }}{% endwith %}{{ a is defined }}",
    "{% set a = 1 %}{% with a = 2, b = a %}{{ a }}{{ b }}{% endwith %}{{ a }}",
    "{% macro f(a, b=2, c='x') %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ f(1) }}{{ f(1, c=3) }}{{ f(b=1, a=0) }}{{ f() }}",
    "{% macro f(a) %}{{ a }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 2, x=3) }}",
    "{% macro f(a) %}{% endmacro %}{{ f(1, 2) }}",
    "{% macro f(a) %}{% endmacro %}{{ f(b=2) }}",
    "{% macro f(n) %}{{ n }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}",
    "{% macro f(a, b=a) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}",
    "{% set x = 1 %}{% macro f() %}{{ x }}{% endmacro %}{% set x = 2 %}{{ f() }}",
    "{% macro f() %}{% set y = 1 %}{{ y }}{% endmacro %}{{ f() }}{{ y is defined }}",
    "{% for i in [1, 2] %}{% macro f() %}{{ i }}{% endmacro %}{{ f() }}{% endfor %}",
    "{% macro f(x) %}[{{ caller(x) }}]{% endmacro %}{% call(y) f(1) %}in {{ y }}{% endcall %}",
    "{% macro f() %}[{{ caller() }}]{% endmacro %}{% call f() %}body{% endcall %}",
    "{% macro f() %}{{ caller is defined }}{% endmacro %}{{ f() }}",
    "{% macro f(a) %}{{ a }}{% endmacro %}{{ f.name }}{{ f.arguments }}{{ f(*[1]) }}{{ f(**{'a': 2}) }}",
    "{% macro outer() %}{% macro inner() %}i{% endmacro %}{{ inner() }}{% endmacro %}{{ outer() }}",
    "{% macro f() %} x {% endmacro %}{{ f() | trim }}|{{ f() ~ 'y' }}",
    "{% for n in [{'v': 1, 'c': [{'v': 2, 'c': []}]}] recursive %}{{ n.v }}{{ loop.depth }}{{ loop(n.c) }}{% endfor %}",
    "{% for m in messages %}{% if loop.changed(m.role) %}x{% endif %}{% endfor %}",
    "{% if messages[0].role == 'system' %}a{% elif false %}b{% else %}c{% endif %}",
    "{% if 0 %}a{% elif 1 %}b{% elif 1 %}c{% endif %}",
    "{% if not nope %}ok{% endif %}{% if nope is not defined %}ok{% endif %}",
    "{% generation %}a{% endgeneration %}",
    "x\n{% generation %}\n  a{{ 1 }}\n{% endgeneration %}\ny",
    "{%- generation -%} a {%- endgeneration -%} b",
    "{%generation%}a{%endgeneration%}{%- generation %} b{% endgeneration -%} c",
    "{% for m in messages %}{% generation %}{{ m.role }}{% set q = 1 %}{% endgeneration %}{{ q is defined }}{% endfor %}",
    "{% block a %}x{{ messages|length }}{% endblock a %}",
    "{% print 1, 'a', none %}{% print messages[0].role %}",
    "{{ 'line1\nline2' }}",
    "{# comment #}a{#- c -#} b\n{# x #}\nc",
    "a {{- 1 -}} b {{+ 2 }} c",
    "  {% if true %}\n  a\n  {% endif %}\nb",
    "  {%+ if true %}\n  a\n  {%+ endif %}\nb",
    "a {% if true %} b {% endif %} c",
    "{% if true -%}\n\n a \n\n{%- endif %}",
    "{% if true +%}\na{% endif +%}\nb",
    "\t {% set x = 1 %}\n{{ x }}\n\n",
    "a\n",
    "a\n\n",
    "",
    "\n",
    "a\r\n{{ 1 }}\r\nb\r{{ 2 }}\r",
    "{{ 'a\r\nb\rc' }}",
    "{% if true %}\r\na\r\n{% endif %}\r\n",
    "{% raw %}{{ x }}{% y %}{# z #}{% endraw %}",
    "a {%- raw -%} {{ x }} {%- endraw -%} b",
    "  {% raw %}\n {{ x }}\n  {% endraw %}\nb",
    "{{ '{{ x }}' }}{{ '%}' }}{{ \"}}\" }}",
    "{{ {'a': {'b': 1}} }}",
    "{{ {'a': 1}}}",
    "{%- for m in messages -%}\n{{- m.role -}}\n{%- endfor -%}\n",
    "{% for m in messages %}\n{{ m.role }}\n{% endfor %}\n",
    "{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}",
    "{% if add_generation_prompt %}A{% endif %}{% if tools %}T{% endif %}{% if tools is none %}N{% endif %}",
    "{% set enable_thinking = enable_thinking if enable_thinking is defined else true %}{{ enable_thinking }}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.current }}{% set j = joiner('; ') %}{{ j() }}{{ j() }}x",
    "{% autoescape false %}<b>{% endautoescape %}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{% if false %}{% include 'x' %}{% endif %}ok",
    "{% if %}",
    "{% for %}",
    "{{ ",
    "{% if true %}",
    "{{ 1 + }}",
    "{% endif %}",
    "{% nope %}",
    "{{ a b }}",
    "{{ 'a }}",
    "{# a",
    "{% raw %}a",
    "{{ [1, 2 }}",
    "{{ 1 ! 2 }}",
    "{% set 1 = 2 %}",
    "{% set a.b.c = 2 %}",
    "{{ 'x' | nope }}",
    "{{ 'x' is nope }}",
    "{% if false %}{{ 'x' | nope }}{% endif %}ok",
    "{{ messages | map('nope') | list }}",
    "{% for m in messages %}{{ m.role + ': ' + (m.content if m.content is string else '') }}\n{% endfor %}",
    "{% for tool in tools %}{{ tool.function | tojson }}\n{% for name, p in tool.function.parameters.properties.items() %}{{ name }}:{{ p.type }},{% endfor %}{% endfor %}",
    "{% for call in messages[2].tool_calls %}{{ call.function.name }}({% for k, v in call.function.arguments | items %}{{ k }}={{ v | tojson }}{{ ', ' if not loop.last }}{% endfor %}){% endfor %}",
    "{%- set parts = messages[0].content.split('.') -%}{{ parts[0] | trim }}|{{ parts[-1] }}|",
    "{% set ns = namespace(last=-1) %}{% for m in messages[::-1] %}{% set i = (messages | length - 1) - loop.index0 %}{% if m.role == 'user' and ns.last < 0 %}{% set ns.last = i %}{% endif %}{% endfor %}{{ ns.last }}",
    "{% macro render(x, depth=0) %}{% if x is mapping %}{ {%- for k, v in x | dictsort %}{{ k }}: {{ render(v, depth + 1) }}{{ ',' if not loop.last }}{% endfor %}}{% elif x is sequence and x is not string %}[{% for v in x %}{{ render(v, depth + 1) }}{{ ',' if not loop.last }}{% endfor %}]{% else %}{{ x }}{% endif %}{% endmacro %}{{ render(messages[2]) }}",
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 1) %}{{ raise_exception('roles must alternate: ' + message.role) }}{% endif %}{% endfor %}",
]

# Templates by the form in which they show a content: a text, a list of parts, or either; for a role where it has its own.
CONTENTS = [
    ("<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}", {'*': 'parts'}),
    ("{{ bos_token }}\n{%- if messages[0]['role'] == 'system' -%}\n    {%- if messages[0]['content'] is string -%}\n        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}\n    {%- else -%}\n        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}\n    {%- endif -%}\n    {%- set loop_messages = messages[1:] -%}\n{%- else -%}\n    {%- set first_user_prefix = \"\" -%}\n    {%- set loop_messages = messages -%}\n{%- endif -%}\n{%- for message in loop_messages -%}\n    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}\n        {{ raise_exception(\"Conversation roles must alternate user/assistant/user/assistant/...\") }}\n    {%- endif -%}\n    {%- if (message['role'] == 'assistant') -%}\n        {%- set role = \"model\" -%}\n    {%- else -%}\n        {%- set role = message['role'] -%}\n    {%- endif -%}\n    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else \"\") }}\n    {%- if message['content'] is string -%}\n        {{ message['content'] | trim }}\n    {%- elif message['content'] is iterable -%}\n        {%- for item in message['content'] -%}\n            {%- if item['type'] == 'image' -%}\n                {{ '<start_of_image>' }}\n            {%- elif item['type'] == 'text' -%}\n                {{ item['text'] | trim }}\n            {%- endif -%}\n        {%- endfor -%}\n    {%- else -%}\n        {{ raise_exception(\"Invalid content type\") }}\n    {%- endif -%}\n    {{ '<end_of_turn>\n' }}\n{%- endfor -%}\n{%- if add_generation_prompt -%}\n    {{'<start_of_turn>model\n'}}\n{%- endif -%}\n", {'*': 'either'}),
    ("{% for m in messages %}<{{ m.role }}>{% for part in m['content'] %}{{ part.text }}{% endfor %}</s>{% endfor %}", {'*': 'parts'}),
    ("{%- for message in messages %}{%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}<|im_start|>{{ message.role }}\n{{ content }}<|im_end|>\n{% endfor %}", {'*': 'text'}),
    ("{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}", {'*': 'text'}),
    ("{% for m in messages %}<{{ m.role }}>{{ m.content | tojson }}</s>{% endfor %}", {'*': 'text'}),
    ("{% for m in messages %}{% if m.role == 'system' %}[{{ m.content | trim }}]{% else %}<{{ m.role }}>{% for part in m.content %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}", {'*': 'parts', 'system': 'text'}),
    ("{% for m in messages %}{{ m.role }}: {{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') }}\n{% endfor %}", {'*': 'parts'}),
]
CONVERSATION = [
    {"role": "system", "content": [" Be kind. "]},
    {"role": "user", "content": ["Hi <b>", " there"]},
    {"role": "assistant", "content": ["Hello"]},
    {"role": "user", "content": ["x"]},
]

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def rendered(template, tools, messages=MESSAGES):
    try:
        options = {"tools": tools, "add_generation_prompt": True, "chat_template": template, **SPECIAL}
        return render_jinja_template([messages], **options)[0][0]
    except Exception:
        return None


def conversation(form, forms):
    """each content in the form, or in the one that the template shows"""

    def content(role, texts):
        shown = forms.get(role, forms["*"])
        if (form if shown == "either" else shown) == "text":
            return "".join(texts)
        texts = ["".join(texts)] if form == "text" else texts
        return [{"type": "text", "text": text} for text in texts]

    return [{"role": it["role"], "content": content(it["role"], it["content"])} for it in CONVERSATION]


def contents(template, forms):
    shown = {form: rendered(template, None, conversation(form, forms)) for form in ["text", "parts"]}
    given = {form: conversation(form, {"*": "either"}) for form in shown}
    return {"template": template, "cases": [{"messages": given[form], "text": shown[form]} for form in shown]}


# Python says where an object lies.
def is_stable(text):
    return text is None or " at 0x" not in text


def main():
    templates = ["{{ " + line + " }}" for line in EXPRESSIONS] + TEMPLATES
    cases = [{"template": template, "text": rendered(template, TOOLS)} for template in templates]
    cases += [{"template": template, "text": rendered(template, None), "tools": None} for template in TEMPLATES]
    cases = [case for case in cases if is_stable(case["text"])]
    data = {"messages": MESSAGES, "tools": TOOLS, "special_tokens": SPECIAL, "cases": cases}
    data["contents"] = [contents(*case) for case in CONTENTS]
    TARGET.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n")
    print(len(cases), "cases")


if __name__ == "__main__":
    main()
