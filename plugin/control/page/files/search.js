// This file looks answers up, lists and flushes them.

import {get, post} from './server.js';
import {element, number, seconds} from './format.js';

const by = id => document.getElementById(id);
const columns = ['name', 'type', 'rcode', 'kind', 'segment', 'accesses', 'TTL left', 'came', ''];
const page = 100; // answers in a page of a list

// confirm asks before a flush. It returns true for yes.
function confirm(text) {
  const dialog = by('question');
  by('question-text').textContent = text;
  dialog.returnValue = '';
  dialog.showModal();
  return new Promise(resolve => dialog.addEventListener('close', () => resolve(dialog.returnValue === 'yes'), {once: true}));
}

// Search is the form and what it finds. blocks returns the ids of the chosen blocks, or nothing for all.
export class Search {
  constructor(blocks) {
    this.blocks = blocks;
    by('yes').addEventListener('click', () => by('question').close('yes'));
    by('no').addEventListener('click', () => by('question').close('no'));
    by('search').addEventListener('submit', event => {
      event.preventDefault();
      this.start(event.submitter?.value || 'lookup');
    });
    by('more').addEventListener('click', () => this.go(() => this.list(true)));
  }

  start(what) {
    if (what === 'lookup') this.go(() => this.lookup());
    else if (what === 'list') this.go(() => this.list(false));
    else this.go(() => this.flush(this.filter()));
  }

  // find shows what is held for a name.
  find(name, type) {
    by('name').value = name;
    by('type').value = type || '';
    by('search').scrollIntoView();
    this.start('lookup');
  }

  // go does something, and says it when it fails. The last thing that was begun is the one that shows.
  async go(what) {
    const turn = this.turn = {};
    try {
      by('found').textContent = 'Asking …';
      const said = await what();
      if (turn === this.turn) by('found').textContent = said;
    } catch (error) {
      if (turn === this.turn) by('found').textContent = 'Failed: ' + error.message;
    }
  }

  filter() {
    const f = {};
    if (by('name').value.trim()) f.name = by('name').value.trim();
    if (by('type').value.trim()) f.type = by('type').value.trim().toUpperCase();
    if (by('kind').value) f.kind = by('kind').value;
    if (by('subtree').checked) f.subtree = true;
    if (by('stale').checked) f.stale = true;
    return f;
  }

  async lookup() {
    const {name = '', type} = this.filter();
    const reply = await get('/v1/lookup', {name, ...(type && {type}), ...this.asked()});
    const answers = reply.blocks.flatMap(block => block.answers.map(answer => ({...answer, block: block.id})));
    this.show(answers, false);
    by('more').hidden = true;
    return answers.length ? `${number(answers.length)} held for ${name}` : `Nothing is held for ${name}`;
  }

  async list(on) {
    const params = on ? {...this.listed, after: this.next} : {...this.filter(), ...this.asked(), limit: page};
    const reply = await get('/v1/list', params);
    this.listed = params;
    this.next = reply.next;
    this.show(reply.answers, on);
    by('more').hidden = !reply.next;
    const shown = by('results').querySelectorAll('tr.answer').length;
    return `${number(shown)} listed` + (reply.next ? ', and there is more' : '');
  }

  // asked are the parameters that choose blocks.
  asked() {
    const ids = this.blocks();
    return ids ? {block: ids} : {};
  }

  async flush({kind, ...filter}) {
    const body = {...filter};
    if (kind) body.kinds = [kind];
    const some = body.name || body.kinds || body.stale;
    if (!some) {
      if (body.type || body.subtree) return 'Failed: a type, and what is below, need a name';
      body.all = true;
    }
    const ids = this.blocks();
    if (ids) body.blocks = ids;
    const words = [
      some ? 'Remove ' + (body.stale ? 'the expired ' : 'the ') + (kind ? kind + ' ' : '') + 'answers' : 'Remove all answers',
      body.name && ' for ' + body.name, body.subtree && ' and all names below it', body.type && ', of type ' + body.type,
      ids ? ', in the chosen block' : ', in all blocks',
    ];
    if (!await confirm(words.filter(Boolean).join('') + '? The next question for each name asks the upstream.')) return 'Nothing is flushed';
    const reply = await post('/v1/flush', body);
    by('results').hidden = by('more').hidden = true;
    return `${number(reply.flushed)} flushed`;
  }

  show(answers, on) {
    const rows = answers.flatMap(answer => this.rows(answer));
    const body = by('results').querySelector('tbody');
    if (on && body) {
      body.append(...rows);
      return;
    }
    const head = element('tr', {}, ...columns.map(title => title
      ? element('th', {scope: 'col'}, title) : element('td', {})));
    by('results').replaceChildren(element('table', {}, element('thead', {}, head), element('tbody', {}, ...rows)));
    by('results').hidden = !answers.length;
  }

  // rows are an answer's line, and another one with its records.
  rows(answer) {
    const button = element('button', {type: 'button', className: 'danger', 'aria-label': `Flush ${answer.name} ${answer.type} …`}, 'Flush …');
    button.addEventListener('click', () => this.go(() => this.flush({name: answer.name, type: answer.type})));
    const bits = [answer.do && 'DO', answer.cd && 'CD', answer.no_rd && 'no RD', answer.subnet].filter(Boolean).join(' ');
    const left = answer.ttl_left > 0 ? `${answer.ttl_left} of ${answer.ttl} s` : answer.stale ? 'stale' : 'expired';
    const cells = [
      answer.type + (bits ? ` (${bits})` : ''), answer.rcode, answer.kind, answer.segment + (answer.hot ? ', hot' : ''), number(answer.accesses), left,
      seconds(Math.max(Date.now() - Date.parse(answer.stored), 0) / 1000) + ' ago', button,
    ];
    const line = element('tr', {className: 'answer'}, element('td', {className: 'name'}, answer.name), ...cells.map(cell => element('td', {}, cell)));
    if (!answer.records?.length) return [line];
    return [line, element('tr', {}, element('td', {className: 'records', colSpan: columns.length}, answer.records.join('\n')))];
  }
}
