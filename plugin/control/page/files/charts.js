// This file draws. Beside each picture there are its values as text: in the legend, and in a table on demand.

import {element, table, clock} from './format.js';

const {uPlot} = window;
const height = 180;
const hour = 3600; // seconds
const dashes = [undefined, [8, 4], [2, 3], undefined, [8, 4], [2, 3]]; // as in page.css

const color = name => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim();

// A chart is a figure: title, picture, legend.
class Chart {
  constructor(parent, id, title) {
    this.plot = element('div', {className: 'plot', 'aria-hidden': 'true'});
    this.legend = element('ul', {className: 'legend'});
    const heading = element('h3', {id: 'chart-' + id}, title);
    this.figure = element('figure', {'aria-labelledby': heading.id}, element('figcaption', {}, heading), this.plot, this.legend);
    parent.append(this.figure);
    new ResizeObserver(() => this.resize()).observe(this.plot);
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => this.redraw());
  }

  resize() {
    const width = this.plot.clientWidth;
    if (width && this.picture && width !== this.picture.width) this.picture.setSize({width, height});
  }

  // redraw makes the picture anew, in the colours that there are now.
  redraw() {
    if (!this.data) return;
    this.picture?.destroy();
    this.picture = new uPlot({...this.options(), width: this.plot.clientWidth || 300, height, legend: {show: false}}, this.data, this.plot);
  }

  draw(data) {
    this.data = data;
    if (this.picture && this.picture.series.length === data.length) this.picture.setData(data);
    else this.redraw();
  }

  axis(more) {
    return {stroke: color('dim'), grid: {stroke: color('grid'), width: 1}, ticks: {stroke: color('grid'), width: 1}, font: '12px system-ui, sans-serif', ...more};
  }
}

// TimeChart has lines over the last hour. series are [label, of]: of makes a value for each time from a model.
export class TimeChart extends Chart {
  constructor(parent, {id, title, format, most, steps, series}) {
    super(parent, id, title);
    Object.assign(this, {format, most, steps, series});
    this.values = series.map(([label], i) => {
      const value = element('b', {'data-series': label}, '–');
      this.legend.append(element('li', {}, element('span', {className: 'key k' + (i + 1), 'aria-hidden': 'true'}), label + ' ', value));
      return value;
    });
    this.details = element('details', {className: 'note'}, element('summary', {}, 'Values of ' + title.toLowerCase()));
    this.details.addEventListener('toggle', () => this.list());
    this.figure.append(this.details);
  }

  update(model) {
    this.draw([model.times, ...this.series.map(([, of]) => of(model))]);
    this.show(this.picture.cursor.idx);
  }

  // show puts the values at a place into the legend, or the latest ones.
  show(at) {
    const last = this.data[0].length - 1;
    this.values.forEach((value, i) => { value.textContent = this.format(this.data[i + 1][at ?? last]); });
  }

  // list shows a table with a line for about every five minutes, the latest first.
  list() {
    this.details.querySelector('.scroll')?.remove();
    if (!this.details.open || !this.data?.[0].length) return;
    const rows = [];
    let next = Infinity;
    for (let i = this.data[0].length - 1; i >= 0; i--) {
      const t = this.data[0][i];
      if (t > next) continue;
      next = t - 300;
      rows.push([clock(t), ...this.series.map((_, s) => this.format(this.data[s + 1][i]))]);
    }
    const columns = [['time'], ...this.series.map(([label]) => [label, 'number'])];
    this.details.append(element('div', {className: 'scroll', role: 'group', tabIndex: 0, 'aria-label': this.details.textContent}, table(columns, rows)));
  }

  options() {
    const times = () => this.data[0];
    return {
      cursor: {y: false, drag: {x: false, y: false}},
      scales: {
        x: {range: () => { const end = times().at(-1) ?? Date.now() / 1000; return [Math.max(end - hour, Math.min(times()[0] ?? end, end - 60)), end]; }},
        y: {range: (_, __, max) => [0, this.most ?? (max > 0 ? max * 1.08 : 1)]},
      },
      axes: [
        this.axis({values: (_, at) => at.map(t => clock(t).slice(0, at.length > 1 && at[1] - at[0] < 60 ? 8 : 5)), space: 70, size: 28}),
        this.axis({values: (_, at) => at.map(v => this.format(v)), size: 68, ...(this.steps && {incrs: this.steps})}),
      ],
      series: [{}, ...this.series.map((_, i) => ({stroke: color('c' + (i + 1)), width: 2, dash: dashes[i], points: {show: false}}))],
      hooks: {setCursor: [u => this.show(u.cursor.idx)]},
    };
  }
}

// BarChart has a bar for each of some ranges. of makes [[label, count]] from a model.
export class BarChart extends Chart {
  constructor(parent, {id, title, format, of, none, each}) {
    super(parent, id, title);
    Object.assign(this, {format, of, none, each});
    this.labels = [];
  }

  update(model) {
    const bars = this.of(model);
    const total = bars.reduce((n, [, count]) => n + count, 0);
    this.labels = bars.map(([label]) => label);
    if (total > 0) this.draw([bars.map((_, i) => i), bars.map(([, count]) => count)]);
    this.plot.hidden = !total;
    const text = total ? bars.filter(([, count]) => count > 0).map(([label, count]) => [label, this.each(count, total)]) : [[this.none, '']];
    this.legend.replaceChildren(...text.map(([label, value]) => element('li', {}, label + ' ', element('b', {}, value))));
  }

  options() {
    const n = () => this.labels.length;
    return {
      cursor: {show: false},
      scales: {x: {time: false, range: () => [-0.6, n() - 0.4]}, y: {range: (_, __, max) => [0, max > 0 ? max * 1.08 : 1]}},
      axes: [
        this.axis({splits: () => this.labels.map((_, i) => i), values: (_, at) => at.map(i => this.labels[i] ?? ''), grid: {show: false}, space: 10,
          rotate: n() > 8 ? -50 : 0, size: n() > 8 ? 50 : 30}),
        this.axis({values: (_, at) => at.map(v => this.format(v)), size: 68}),
      ],
      series: [{}, {stroke: color('c1'), fill: color('c1'), width: 0, paths: uPlot.paths.bars({size: [0.8, 48]}), points: {show: false}}],
    };
  }
}
