// This file joins the parts of the page: it follows the server, and shows what it says.

import {Problem, events, get, post, setToken} from './server.js';
import {Model} from './model.js';
import {BarChart, TimeChart} from './charts.js';
import {barCharts, tiles, timeCharts, totals} from './numbers.js';
import {Search} from './search.js';
import {Top} from './top.js';
import {bytes, clock, element, number, table} from './format.js';

const retryAfter = 2000; // ms
const silence = 10000; // ms without an event: the connection is dead
const by = id => document.getElementById(id);

const model = new Model();
const chosen = () => model.chosen ? model.blocks().map(block => block.id) : null;
const search = new Search(chosen);
const top = new Top(chosen, (name, type) => search.find(name, type));
const charts = [];

function say(text, live = false) {
  const state = by('state');
  if (state.textContent !== text) state.textContent = text;
  state.classList.toggle('live', live);
}

const pause = ms => new Promise(resolve => { setTimeout(resolve, ms); });

const visible = () => new Promise(resolve => {
  if (!document.hidden) resolve();
  else document.addEventListener('visibilitychange', () => resolve(), {once: true});
});

// follow shows the server's events. It asks again when they end, but not while nobody looks.
async function follow() {
  for (;;) {
    await visible();
    try {
      await once();
      if (!document.hidden) say('The connection has ended; trying again');
    } catch (error) {
      if (error instanceof Problem && error.status === 401) {
        await askForToken();
        continue;
      }
      say((error instanceof Problem ? error.message : 'No connection') + '; trying again');
    }
    await pause(document.hidden ? 0 : retryAfter);
  }
}

async function once() {
  const stop = new AbortController();
  const hide = () => { if (document.hidden) stop.abort(); };
  document.addEventListener('visibilitychange', hide);
  let timer;
  const wait = () => { clearTimeout(timer); timer = setTimeout(() => stop.abort(), silence); };
  try {
    wait();
    const [status, history] = await Promise.all([get('/v1/status', {}, stop.signal), get('/v1/history', {}, stop.signal)]);
    model.load(history, status);
    for await (const event of events(stop.signal)) {
      wait();
      model.add(event, Date.parse(event.time) / 1000);
      by('data').hidden = false;
      show();
      say('Live', true);
    }
  } catch (error) {
    if (error.name !== 'AbortError' || !document.hidden) throw error;
  } finally {
    clearTimeout(timer);
    stop.abort();
    document.removeEventListener('visibilitychange', hide);
  }
}

// askForToken waits until a token is given.
function askForToken() {
  say('This server wants a token');
  by('data').hidden = true;
  by('token').hidden = false;
  by('token-text').value = '';
  by('token-text').focus();
  return new Promise(resolve => by('token').addEventListener('submit', event => {
    event.preventDefault();
    setToken(by('token-text').value.trim());
    by('token').hidden = true;
    say('Connecting');
    resolve();
  }, {once: true}));
}

// --- what is shown. It is changed in place, so that a selection or a screen reader's place in it is not lost.

function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function show() {
  put(by('version'), model.status.version);
  showChoices();
  for (const [name, , value, more] of tiles) {
    put(by('tile-' + name), value(model));
    put(by('more-' + name), more(model));
  }
  if (!charts.length) {
    for (const c of timeCharts) charts.push(new TimeChart(by('charts'), c));
    for (const c of barCharts) charts.push(new BarChart(by('charts'), c));
  }
  for (const chart of charts) chart.update(model);
  showTotals();
  showPast();
  top.update();
}

function showChoices() {
  const choices = model.choices();
  const list = JSON.stringify(choices);
  if (by('block').dataset.list === list) return;
  by('block').dataset.list = list;
  by('block').replaceChildren(element('option', {value: ''}, 'all'), ...choices.map(([key, title]) => element('option', {value: key}, title)));
  by('block').value = choices.some(([key]) => key === model.chosen) ? model.chosen : '';
  model.chosen = by('block').value;
}

function showTotals() {
  const rows = totals(model);
  const names = rows.map(([name]) => name).join();
  if (by('totals').dataset.names !== names) {
    by('totals').dataset.names = names;
    by('totals').replaceChildren(table([['count'], ['since the start', 'number']],
      rows.map(([name, title]) => [title, element('span', {id: 'total-' + name})])));
  }
  for (const [name, , value] of rows) put(by('total-' + name), number(value));
}

function showPast() {
  by('snapshot-now').hidden = !model.blocks().some(block => block.snapshot);
  const rows = model.past().map(({time, what, generation, entries, bytes: size, block}) => {
    const more = what === 'reload' ? `generation ${number(generation)}, ${number(entries)} answers kept`
      : what === 'snapshot' ? `${number(entries)} answers, ${bytes(size)}` : '';
    return [clock(time), what, more, block.zones.join(' ')];
  });
  const text = JSON.stringify(rows);
  if (by('history').dataset.text === text) return;
  by('history').dataset.text = text;
  by('history').replaceChildren(rows.length ? table([['time'], ['what'], ['result', 'name'], ['block', 'name']], rows)
    : element('p', {}, 'None in the last hour.'));
}

for (const [name, title] of tiles) {
  by('tiles').append(element('div', {}, element('dt', {}, title),
    element('dd', {}, element('span', {id: 'tile-' + name}, '–'), element('span', {id: 'more-' + name, className: 'more'}))));
}

by('block').addEventListener('change', () => {
  model.chosen = by('block').value;
  top.now();
  show();
});

by('snapshot').addEventListener('click', async () => {
  put(by('snapshot-state'), 'Writing …');
  try {
    const with_ = model.blocks().filter(block => block.snapshot).map(block => block.id);
    const reply = await post('/v1/snapshot', {blocks: with_});
    put(by('snapshot-state'), `Written: ${number(reply.written.length)}`);
  } catch (error) {
    put(by('snapshot-state'), 'Failed: ' + error.message);
  }
});

follow();
