// The plot of two costs, or of a cost and accuracy, with the front of the best.
'use strict';
const SVG = 'http://www.w3.org/2000/svg';
const MARGIN = { left: 48, right: 16, top: 30, bottom: 44 };
const NAMES = { memory: 'memory', time: 'time of a step', flops: 'FLOPs' };

function isGain(key) { return key.startsWith('gain:'); }

function valueOf(row, key) {
  return isGain(key) ? row.gains[key.slice(5)] ?? null : row[key];
}

function ticksOf(low, high, count) {
  const width = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(width));
  const step = [1, 2, 2.5, 5, 10].map((f) => f * power).find((s) => s >= width);
  const ticks = [];
  for (let n = Math.floor(low / step); n <= Math.ceil(high / step); n += 1) {
    ticks.push(Number((n * step).toPrecision(8)));
  }
  return ticks;
}

// Points that no other beats on both axes; across less is better, up depends.
function frontOf(points, upIsBetter) {
  const sign = upIsBetter ? -1 : 1;
  const sorted = [...points].sort((a, b) => a.x - b.x || sign * (a.y - b.y));
  let best = Infinity;
  return sorted.filter((point) => {
    if (sign * point.y >= best) return false;
    best = sign * point.y;
    return true;
  });
}

function draw(tag, attributes, parent, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function describe(row, keys) {
  const lines = keys.map((key) => {
    const value = valueOf(row, key);
    if (isGain(key)) return `${key.slice(5)} ${value > 0 ? '+' : ''}${value.toFixed(3)}`;
    return `${NAMES[key]} ${value.toFixed(3)}`;
  });
  const images = [row.dataset, row.images].filter(Boolean).join(', ');
  return [`${row.method}${row.K > 1 ? `, K=${row.K}` : ''}`, row.model, images, ...lines];
}

function drawFront(holder, rows, across, up, units) {
  holder.replaceChildren();
  const points = rows
    .map((row) => ({ row, x: valueOf(row, across), y: valueOf(row, up) }))
    .filter((point) => point.x !== null && point.y !== null);
  if (!points.length) {
    const text = document.createElement('p');
    text.className = 'empty';
    text.textContent = 'No result that fits the filters has both numbers.';
    holder.append(text);
    return;
  }
  const { clientWidth: width, clientHeight: height } = holder;
  const svg = draw('svg', { viewBox: `0 0 ${width} ${height}`, role: 'group' }, holder);
  svg.setAttribute('aria-label', `${points.length} results by ${across} and ${up}`);
  const narrow = width < 500;
  const range = (name, count) => {
    const values = points.map((point) => point[name]);
    return ticksOf(Math.min(...values), Math.max(...values), count);
  };
  const xs = range('x', narrow ? 4 : 8);
  const ys = range('y', 5);
  const right = width - MARGIN.right;
  const bottom = height - MARGIN.bottom;
  const place = (value, ticks, from, to) =>
    from + ((value - ticks[0]) / (ticks.at(-1) - ticks[0])) * (to - from);
  const x = (value) => place(value, xs, MARGIN.left, right);
  const y = (value) => place(value, ys, bottom, MARGIN.top);

  for (const tick of ys) {
    draw('line', { class: 'grid', x1: MARGIN.left, x2: right, y1: y(tick), y2: y(tick) }, svg);
    draw('text', { x: MARGIN.left - 9, y: y(tick) + 4, 'text-anchor': 'end' }, svg, tick);
  }
  for (const tick of xs) {
    draw('text', { x: x(tick), y: bottom + 19, 'text-anchor': 'middle' }, svg, tick);
  }
  const unit = isGain(up) ? units[up.slice(5)] : undefined;
  const better = isGain(up) ? 'more is better' : 'less is better';
  const title = isGain(up)
    ? `${up.slice(5)} to end-to-end${unit ? `, ${unit}` : ''}` : NAMES[up];
  draw('text', { x: right, y: bottom + 38, 'text-anchor': 'end' }, svg, `${NAMES[across]} →`);
  draw('text', { x: 0, y: 12 }, svg, `↑ ${title} (${better})`);
  const same = isGain(up) ? 0 : 1;
  if (same >= ys[0] && same <= ys.at(-1)) {
    draw('line', { class: 'one', x1: MARGIN.left, x2: right, y1: y(same), y2: y(same) }, svg);
  }
  if (1 >= xs[0] && 1 <= xs.at(-1)) {
    draw('line', { class: 'one', x1: x(1), x2: x(1), y1: MARGIN.top, y2: bottom }, svg);
  }
  const front = frontOf(points, isGain(up));
  const path = front.map((point, i) => (i ? `H${x(point.x)}V${y(point.y)}` : `M${x(point.x)},${y(point.y)}`));
  draw('path', { class: 'front', d: path.join('') }, svg);

  const tip = document.createElement('div');
  tip.className = 'tip';
  tip.hidden = true;
  // Baselines lie on one another: the first ones are drawn below the others.
  for (const point of [...points].sort((a, b) => b.row.is_baseline - a.row.is_baseline)) {
    const lines = describe(point.row, [across, up]);
    const link = draw('a', {
      href: `entries/${point.row.id}.html`,
      class: `m${point.row.colour} ${point.row.kind}`,
      'aria-label': lines.join(', '),
      'data-id': point.row.id,
    }, svg);
    draw('circle', { cx: x(point.x), cy: y(point.y), r: narrow ? 5 : 6 }, link);
    const show = () => {
      const head = document.createElement('b');
      head.textContent = lines[0];
      tip.replaceChildren(head, ...lines.slice(1).filter(Boolean).map((line) => {
        const span = document.createElement('span');
        span.textContent = line;
        return span;
      }));
      tip.hidden = false;
      const left = Math.min(x(point.x) + 14, width - tip.offsetWidth - 4);
      const above = y(point.y) - tip.offsetHeight - 10;
      tip.style.left = `${Math.max(left, 0)}px`;
      tip.style.top = `${above > 0 ? above : y(point.y) + 12}px`;
    };
    const hide = () => { tip.hidden = true; };
    link.addEventListener('pointerenter', show);
    link.addEventListener('focus', show);
    link.addEventListener('pointerleave', hide);
    link.addEventListener('blur', hide);
  }
  holder.append(tip);
}

function drawLegend(list, rows) {
  const methods = new Map(rows.map((row) => [row.method, row.colour]));
  const items = [...methods].sort((a, b) => a[1] - b[1]).map(([method, colour]) => {
    const item = document.createElement('li');
    const dot = document.createElement('span');
    dot.className = `dot m${colour}`;
    item.append(dot, method);
    return item;
  });
  list.replaceChildren(...items);
}
