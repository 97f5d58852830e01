// This file keeps what the blocks were in the last hour, and makes series of it: sums over blocks, rates, ratios.
//
// A number has the name of its members in the server's status, with dots: requests, hits.hot, entries.success.

const kept = 3600; // seconds
const gap = 30; // between two samples that are further apart, there is no rate

// keyOf is the same for a block before and after a reload.
const keyOf = block => [block.zones.join(' '), block.view || '', block.servers.join(' ')].join('\n');

export function titleOf(block) {
  return block.zones.join(' ') + (block.view ? ', view ' + block.view : '') + ' at ' + block.servers.join(' ');
}

// numbers returns every number of a status by its name.
function numbers(members, prefix = '', all = new Map()) {
  for (const [name, value] of Object.entries(members)) {
    if (typeof value === 'number' && prefix + name !== 'id') all.set(prefix + name, value);
    else if (value && typeof value === 'object' && !Array.isArray(value)) numbers(value, prefix + name + '.', all);
  }
  return all;
}

// ofPool says whether a number is one of a pool, as pools.NAME.memory_bytes.
const ofPool = name => name.startsWith('pools.');

// sum adds numbers, of which some may be missing. It is null if all are.
const sum = values => values.reduce((all, v) => Number.isNaN(v) ? all : all + v, null);

export class Model {
  times = []; // of samples, in seconds since 1970
  columns = new Map(); // by block: its numbers, by name, one for each time; NaN where there is none
  status = {version: '', blocks: []}; // the latest one
  chosen = ''; // the key of a block, or empty: all

  // load takes the server's history. ids in it are those of a status.
  load(history, status) {
    const known = new Map(status.blocks.map(block => [block.id, block]));
    this.times = [...new Set(history.blocks.flatMap(block => block.at))].sort((a, b) => a - b);
    const place = new Map(this.times.map((t, i) => [t, i]));
    this.columns = new Map();
    for (const block of history.blocks) {
      if (!known.has(block.id)) continue;
      const columns = new Map();
      for (const [name, values] of Object.entries(block.series)) {
        const column = new Array(this.times.length).fill(NaN);
        values.forEach((value, i) => { column[place.get(block.at[i])] = value; });
        columns.set(name, column);
      }
      this.columns.set(keyOf(known.get(block.id)), columns);
    }
  }

  // add takes a status, and the time when it was made.
  add(status, time) {
    this.status = status;
    if (time <= this.times.at(-1)) return;
    this.times.push(time);
    for (const block of status.blocks) {
      const key = keyOf(block);
      const unknown = this.columns.has(key) ? 0 : NaN; // a number that a block has not had so far is 0, as in the server's history
      if (!this.columns.has(key)) this.columns.set(key, new Map());
      const columns = this.columns.get(key);
      for (const [name, value] of numbers(block)) {
        if (!columns.has(name)) columns.set(name, new Array(this.times.length - 1).fill(unknown));
        columns.get(name).push(value);
      }
    }
    for (const columns of this.columns.values()) {
      for (const column of columns.values()) if (column.length < this.times.length) column.push(NaN);
    }
    const old = this.times.findIndex(t => t > time - kept);
    if (old > 60) { // now and then
      this.times.splice(0, old);
      for (const columns of this.columns.values()) for (const column of columns.values()) column.splice(0, old);
    }
  }

  // blocks are those of the latest status that are chosen.
  blocks() {
    const chosen = this.status.blocks.filter(block => keyOf(block) === this.chosen);
    return chosen.length ? chosen : this.status.blocks;
  }

  choices() { return this.status.blocks.map(block => [keyOf(block), titleOf(block)]); }

  // of returns the columns of chosen blocks whose names fit. Blocks of a pool have its numbers in common: each counts once.
  of(fits) {
    const all = [], seen = new Set();
    for (const key of new Set(this.blocks().map(keyOf))) {
      const columns = this.columns.get(key) || new Map();
      const pooled = [...columns.keys()].some(ofPool);
      for (const [name, column] of columns) {
        if (!fits(name, pooled) || seen.has(name)) continue;
        if (ofPool(name)) seen.add(name);
        all.push(column);
      }
    }
    return all;
  }

  // gauge is the sum of numbers whose names fit, at each time.
  gauge(fits) {
    const columns = this.of(fits);
    return this.times.map((_, i) => sum(columns.map(column => column[i])));
  }

  // mean is the mean of a number of the blocks, at each time.
  mean(fits) {
    const columns = this.of(fits);
    return this.times.map((_, i) => {
      const there = columns.map(column => column[i]).filter(v => !Number.isNaN(v));
      return there.length ? there.reduce((a, b) => a + b) / there.length : null;
    });
  }

  // rate is by how much counters grow in a second. A counter that falls is one that began anew.
  rate(fits) {
    const columns = this.of(fits);
    return this.times.map((t, i) => {
      const from = this.before(i);
      if (from < 0) return null;
      const grown = sum(columns.map(column => Math.max(column[i] - column[from], 0)));
      return grown === null ? null : grown / (t - this.times[from]);
    });
  }

  // before returns the sample that a rate at the sample i is measured from: about five seconds earlier, so that rates do not
  // jump. It is -1 where there is none.
  before(i) {
    let from = i - 1;
    while (from > 0 && this.times[i] - this.times[from] < 4.5) from--;
    return from >= 0 && this.times[i] - this.times[from] <= gap ? from : -1;
  }

  // now is a number of the chosen blocks, summed.
  now(fits) {
    const all = [], seen = new Set();
    for (const block of this.blocks()) {
      for (const [name, value] of numbers(block)) {
        if (!fits(name, Boolean(block.pools)) || seen.has(name)) continue;
        if (ofPool(name)) seen.add(name);
        all.push(value);
      }
    }
    return sum(all);
  }

  // grown returns by how much counters have grown in the time that is kept, by the end of their names. Blocks share some of
  // them: with shared, a name counts once.
  grown(pattern, shared) {
    const all = new Map(), seen = new Set();
    for (const key of new Set(this.blocks().map(keyOf))) {
      for (const [name, column] of this.columns.get(key) || []) {
        const match = pattern.exec(name);
        if (!match || (shared && seen.has(name))) continue;
        seen.add(name);
        const there = column.filter(v => !Number.isNaN(v));
        const n = there.length ? there.at(-1) - (there.at(-1) >= there[0] ? there[0] : 0) : 0;
        all.set(match[1], (all.get(match[1]) || 0) + n);
      }
    }
    return all;
  }

  // past returns what has happened in the time that is kept, the latest first: [time, what, more].
  past() {
    const all = [];
    for (const block of this.blocks()) {
      const columns = this.columns.get(keyOf(block)) || new Map();
      const each = (name, what) => {
        const column = columns.get(name) || [];
        let before = NaN;
        column.forEach((value, i) => {
          if (!Number.isNaN(before) && value !== before && value > 0) what(i, value, before);
          if (!Number.isNaN(value)) before = value;
        });
      };
      const at = (name, i) => (columns.get(name) || [])[i];
      each('generation', (i, n) => all.push({time: this.times[i], what: 'reload', generation: n, entries: at('kept', i), block}));
      each('snapshot.writes', i => all.push({time: this.times[i], what: 'snapshot', entries: at('snapshot.entries', i), bytes: at('snapshot.bytes', i), block}));
      each('snapshot.failures', i => all.push({time: this.times[i], what: 'snapshot failed', block}));
    }
    return all.sort((a, b) => b.time - a.time);
  }
}
