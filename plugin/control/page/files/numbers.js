// This file says which numbers the page shows, and how.

import {amount, bytes, number, percent, rate, seconds} from './format.js';

const is = (...names) => name => names.includes(name);
const begins = prefix => name => name.startsWith(prefix);

// held fits a number of the memory, which blocks of a pool have in common. A prefix ends in a dot.
const held = of => (name, pooled) => {
  const own = pooled ? name.replace(/^pools\..*?\.(?=(capacity|segments|memory_parts)\.[a-z]+$|[a-z_]+$)/, '') : name;
  if (pooled && own === name) return false;
  return of.endsWith('.') ? own.startsWith(of) : own === of;
};
const hits = begins('hits.');
const message = name => name.startsWith('sent.') && name !== 'sent.fastpath' && name !== 'sent.bytes';

const powers = Array.from({length: 50}, (_, i) => 2 ** i); // steps of an axis of bytes

// ratio divides series.
const ratio = (above, below) => above.map((a, i) => a === null || !below[i] ? null : Math.min(a / below[i], 1));

export const timeCharts = [
  {id: 'ratio', title: 'Hit ratio', format: percent, most: 1, series: [
    ['hit ratio', m => ratio(m.rate(hits), m.rate(is('requests')))],
  ]},
  {id: 'queries', title: 'Queries per second, by way', format: rate, series: [
    ['fast path', m => m.rate(is('sent.fastpath'))],
    ['bytes', m => m.rate(is('sent.bytes'))],
    ['message', m => m.rate(message)],
    ['miss', m => m.rate(is('misses'))],
  ]},
  {id: 'classes', title: 'Entries, by class', format: amount, series: [
    ['success', m => m.gauge(is('entries.success'))],
    ['denial', m => m.gauge(is('entries.denial'))],
  ]},
  {id: 'tiers', title: 'Entries, by tier', format: amount, series: [
    ['window', m => m.gauge(held('segments.window'))],
    ['probationary', m => m.gauge(held('segments.probationary'))],
    ['protected', m => m.gauge(held('segments.protected'))],
    ['heavy', m => m.gauge(held('segments.heavy'))],
    ['copies in the hot tier', m => m.gauge(held('hot_entries'))],
  ]},
  {id: 'memory', title: 'Memory', format: bytes, steps: powers, series: [
    ['success', m => m.gauge(held('memory_parts.success'))],
    ['denial', m => m.gauge(held('memory_parts.denial'))],
    ['hot tier', m => m.gauge(held('memory_parts.hot'))],
    ['index', m => m.gauge(held('memory_parts.index'))],
    ['other', m => m.gauge(held('memory_parts.other'))],
    ['all', m => m.gauge(held('memory_bytes'))],
  ]},
  {id: 'sizes', title: 'Sizes that the climber moves', format: percent, series: [
    ['window', m => m.mean(is('window_share'))],
    ['hot tier', m => ratio(m.gauge(held('hot_capacity')), m.gauge(held('capacity.')))],
  ]},
  {id: 'spared', title: 'Instead of questions by clients', format: rate, series: [
    ['answers by nxdomain_cut', m => m.rate(is('upstream.synthesized'))],
    ['its probes', m => m.rate(is('upstream.probes'))],
    ['questions of keep_warm', m => m.rate(is('upstream.kept_warm'))],
    ['held back by upstream_limit', m => m.rate(begins('upstream.limited.'))],
  ]},
  {id: 'flights', title: 'Under way', format: number, series: [
    ['questions to upstream', m => m.gauge(is('flights'))],
    ['requests that wait for one', m => m.gauge(is('waiting'))],
  ]},
];

const share = (count, total) => percent(count / total);

// bars makes [[label, count]] of counts by their upper bound.
const bars = (counts, label) => [...counts].map(([bound, n]) => [bound === '+Inf' ? Infinity : Number(bound), n]).sort(([a], [b]) => a - b).map(([bound, n]) => [label(bound), n]);

export const barCharts = [
  {id: 'upstream', title: 'Time until upstream has answered', format: amount, none: 'Upstream has been asked nothing in this hour.', each: share,
    of: m => bars(m.grown(/^miss_times\.(.+)$/), n => n === Infinity ? 'longer' : '≤ ' + seconds(n))},
  {id: 'batches', title: 'Packets that the fast path took at once', format: amount, none: 'The fast path has had no packets in this hour.', each: share,
    of: m => bars(m.grown(/^fast_path\..*\.batches\.(\d+)$/, true), n => '≤ ' + n)},
  {id: 'shared', title: 'What became of questions to the second level', format: amount, none: 'No second level has been asked in this hour.', each: share,
    of: m => [...m.grown(/^shared\.asked\.(.+)$/)].filter(([, n]) => n > 0).sort(([, a], [, b]) => b - a)},
];

// minutes returns a ratio over the last minutes.
function hitRatio(m, minutes) {
  const from = m.times.findIndex(t => t >= m.times.at(-1) - 60 * minutes);
  const grown = fits => m.of(fits).reduce((n, column) => {
    const there = column.slice(from).filter(v => !Number.isNaN(v));
    return n + (there.length ? Math.max(there.at(-1) - there[0], 0) : 0);
  }, 0);
  const requests = grown(is('requests'));
  return requests ? Math.min(grown(hits) / requests, 1) : null;
}

const age = written => written ? seconds(Math.max(Date.now() - Date.parse(written), 0) / 1000) + ' old' : 'never written';

// A tile is [name, title, value, more].
export const tiles = [
  ['ratio', 'Hit ratio, 1 min', m => percent(hitRatio(m, 1)), m => `5 min: ${percent(hitRatio(m, 5))}\n60 min: ${percent(hitRatio(m, 60))}`],
  ['queries', 'Queries', m => rate(m.rate(is('requests')).at(-1)), m => `misses ${rate(m.rate(is('misses')).at(-1))}`],
  ['entries', 'Entries', m => number(m.now(begins('entries.'))), m => `of ${number(m.now(held('capacity.')))}`],
  ['memory', 'Memory', m => bytes(m.now(held('memory_bytes'))), m => `of ${bytes(m.now(held('memory_limit_bytes')))}`],
  ['hot', 'Hot tier', m => number(m.now(held('hot_entries'))), m => `room for ${number(m.now(held('hot_capacity')))}`],
  ['window', 'Window', m => percent(m.mean(is('window_share')).at(-1)), () => 'of the entries'],
  ['flights', 'Under way', m => number(m.now(is('flights'))), m => `${number(m.now(is('waiting')))} requests wait`],
  ['snapshot', 'Snapshot', m => {
    const all = m.blocks().filter(b => b.snapshot);
    return all.length ? age(all.map(b => b.snapshot.written || '').sort()[0]) : 'none';
  }, m => {
    const failed = m.now(is('snapshot.failures'));
    return failed ? `${number(failed)} failures` : '';
  }],
  ['shared', 'Second level', m => {
    const all = m.blocks().filter(b => b.shared);
    return !all.length ? 'none' : all.some(b => b.shared.away) ? 'away' : 'in use';
  }, m => {
    const all = m.blocks().filter(b => b.shared);
    if (!all.length) return '';
    const trouble = all.map(b => b.shared.trouble || '').find(text => text);
    if (trouble) return trouble;
    const asked = m.now(begins('shared.asked.'));
    return `${percent(asked ? m.now(is('shared.asked.hit')) / asked : null)} hits\n95 of 100 in ${seconds(Math.max(...all.map(b => b.shared.p95)))}`;
  }],
];

const titles = {
  'shared.flushes': 'flushes of other replicas', 'shared.warmed': 'answers taken over from the second level at the start',
  requests: 'requests', misses: 'misses', served_stale: 'served stale', prefetches: 'refreshes in the background', evictions: 'evictions',
};

// Of these, only those are shown that there were.
const rare = {
  'upstream.synthesized': 'requests answered by nxdomain_cut', 'upstream.probes': 'probes of nxdomain_cut', 'upstream.kept_warm': 'questions of keep_warm',
  'upstream.jittered': 'answers shortened by jitter', 'upstream.limited.deferred': 'refreshes put off by upstream_limit',
  'upstream.limited.stale': 'stale answers by upstream_limit', 'upstream.limited.waited': 'misses that waited for upstream_limit',
  'upstream.limited.refused': 'misses refused by upstream_limit', 'upstream.gone': 'zones whose upstream is gone, now',
  'subnets.answers': 'answers for a client subnet, now', 'subnets.names': 'names with such answers, now',
  'subnets.evicted.name': 'such answers evicted: their name has MAX', 'subnets.evicted.share': 'such answers evicted: all have their share',
};

// sharedTitles are what the second level counts by kinds.
const sharedTitles = {asked: 'questions to the second level', refused: 'answers of the second level that are not believed', writes: 'answers to put into the second level'};

// totals returns rows [name, title, value] of what was counted since the server started.
export function totals(m) {
  const names = new Set();
  for (const block of m.blocks()) {
    names.add('requests');
    for (const tier of Object.keys(block.hits)) names.add('hits.' + tier);
    for (const [way, n] of Object.entries(block.sent)) if (n > 0 || way === 'fastpath' || way === 'bytes') names.add('sent.' + way);
    for (const name of Object.keys(titles)) if (block.shared || !name.startsWith('shared.')) names.add(name);
    for (const [group, counts] of Object.entries(block.shared || {})) {
      for (const of of Object.keys(sharedTitles[group] ? counts : {})) names.add(`shared.${group}.${of}`);
    }
  }
  for (const name of Object.keys(rare)) if (m.now(is(name)) > 0) names.add(name);
  return [...names].map(name => {
    const [group, of, last] = name.split('.');
    const title = titles[name] || rare[name] || (sharedTitles[of] && `${sharedTitles[of]}: ${last}`) || (group === 'hits' ? `hits in the ${of} tier` : of === 'fastpath' || of === 'bytes' ? `hits sent by way of ${of}` : `hits sent as a message: ${of}`);
    return [name, title, m.now(is(name))];
  });
}

