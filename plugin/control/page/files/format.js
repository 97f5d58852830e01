// This file makes text and elements of numbers. Text becomes text, and never markup: names come from the network.

// element returns a new element. properties are set on it; children are elements or text.
export function element(tag, properties = {}, ...children) {
  const e = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes('-')) e.setAttribute(name, value);
    else e[name] = value;
  }
  e.append(...children.map(child => child instanceof Node ? child : String(child)));
  return e;
}

// table returns a table. Each column is [title, class]. Each cell is text or an element.
export function table(columns, rows) {
  const head = element('tr', {}, ...columns.map(([title, of = '']) => element('th', {scope: 'col', className: of}, title)));
  const line = row => row instanceof Node ? row : element('tr', {}, ...row.map((cell, i) => element('td', {className: columns[i][1] || ''}, cell)));
  return element('table', {}, element('thead', {}, head), element('tbody', {}, ...rows.map(line)));
}

const whole = new Intl.NumberFormat('en');
const three = new Intl.NumberFormat('en', {maximumSignificantDigits: 3});

export const number = n => n == null ? '–' : whole.format(Math.round(n));

// amount is a number as short as it can be: 1.23M.
export function amount(n) {
  if (n == null) return '–';
  const [unit, by] = Math.abs(n) >= 1e9 ? ['G', 1e9] : Math.abs(n) >= 1e6 ? ['M', 1e6] : Math.abs(n) >= 1e4 ? ['k', 1e3] : ['', 1];
  return three.format(n / by) + unit;
}

export const rate = n => n == null ? '–' : amount(n) + '/s';

export const percent = share => share == null ? '–' : (100 * share).toFixed(1) + ' %';

export function bytes(n) {
  if (n == null) return '–';
  let i = 0;
  for (; Math.abs(n) >= 1024 && i < 4; i++) n /= 1024;
  return three.format(n) + [' B', ' KiB', ' MiB', ' GiB', ' TiB'][i];
}

// seconds is a duration: 1.5 ms.
export function seconds(s) {
  if (s == null) return '–';
  if (s >= 86400) return three.format(s / 86400) + ' d';
  if (s >= 3600) return three.format(s / 3600) + ' h';
  if (s >= 60) return three.format(s / 60) + ' min';
  if (s >= 1) return three.format(s) + ' s';
  if (s >= 1e-3) return three.format(s * 1e3) + ' ms';
  return three.format(s * 1e6) + ' µs';
}

// clock is the time of the day of a time in seconds since 1970.
export const clock = t => new Date(t * 1000).toLocaleTimeString('en-GB');
