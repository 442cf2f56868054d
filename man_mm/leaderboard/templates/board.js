// The table of all results: sorting and filters, which the plot follows.
'use strict';
(() => {
  const rows = JSON.parse(document.getElementById('entries').textContent);
  const byId = new Map(rows.map((row) => [row.id, row]));
  const form = document.getElementById('filters');
  const table = document.getElementById('board');
  const body = table.tBodies[0];
  const trs = [...body.rows];
  const front = document.getElementById('front');
  const across = document.getElementById('axis-x');
  const up = document.getElementById('axis-y');
  const units = JSON.parse(front.dataset.units);
  const KEYS = {
    method: (row) => row.method.toLowerCase(),
    model: (row) => `${row.model} ${row.dataset}`.toLowerCase(),
    accuracy: (row) => {
      const [text] = Object.values(row.metrics);
      return text === undefined ? null : parseFloat(text);
    },
    gain: (row) => (row.is_baseline ? null : Object.values(row.gains)[0] ?? null),
  };
  // The greatest first, when a column is sorted for the first time.
  const DESCENDING = new Set(['accuracy', 'gain']);

  function visible() {
    const wanted = [...new FormData(form)].filter(([, value]) => value);
    return rows.filter((row) => wanted.every(([key, value]) => row[key] === value));
  }

  function filter() {
    const shown = visible();
    const ids = new Set(shown.map((row) => row.id));
    for (const tr of trs) tr.hidden = !ids.has(tr.dataset.id);
    document.getElementById('count').textContent = `${shown.length} of ${rows.length}`;
    document.getElementById('empty').hidden = shown.length > 0;
    redraw();
  }

  function redraw() {
    const shown = visible();
    drawFront(front, shown, across.value, up.value, units);
    const drawn = shown.filter((row) => (
      valueOf(row, across.value) !== null && valueOf(row, up.value) !== null));
    drawLegend(document.getElementById('legend'), drawn);
  }

  function sort(key, direction) {
    const value = KEYS[key] ?? ((row) => row[key]);
    const sign = direction === 'ascending' ? 1 : -1;
    const compare = (a, b) => {
      const [x, y] = [value(byId.get(a.dataset.id)), value(byId.get(b.dataset.id))];
      if (x === null || y === null) return (x === null) - (y === null); // always last
      return sign * (x < y ? -1 : x > y ? 1 : 0);
    };
    body.append(...trs.sort(compare));
    for (const th of table.tHead.rows[0].cells) {
      if (th.dataset.key === key) th.setAttribute('aria-sort', direction);
      else th.removeAttribute('aria-sort');
    }
  }

  function first(key) { return DESCENDING.has(key) ? 'descending' : 'ascending'; }

  for (const th of table.tHead.rows[0].cells) {
    th.querySelector('button').addEventListener('click', () => {
      const { key } = th.dataset;
      const other = { ascending: 'descending', descending: 'ascending' };
      sort(key, other[th.getAttribute('aria-sort')] ?? first(key));
    });
  }
  document.getElementById('sort').addEventListener('change', (event) => {
    sort(event.target.value, first(event.target.value));
  });
  form.addEventListener('change', filter);
  form.addEventListener('reset', () => setTimeout(filter));
  form.addEventListener('submit', (event) => event.preventDefault());
  across.addEventListener('change', redraw);
  up.addEventListener('change', redraw);
  new ResizeObserver(redraw).observe(front);
  filter();
})();
