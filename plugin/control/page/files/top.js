// This file shows what comes most often.

import {get} from './server.js';
import {element, number, percent, table} from './format.js';

const every = 5000; // ms from one look to the next
const limit = 15; // items of a block that are shown
const by = id => document.getElementById(id);

// Top is the table. blocks returns the ids of the chosen blocks, or nothing for all. find is called with a name to look up.
export class Top {
  constructor(blocks, find) {
    this.blocks = blocks;
    this.find = find;
    this.next = 0;
    by('top-by').addEventListener('change', () => this.now());
  }

  // now looks again at once.
  now() {
    this.next = 0;
    this.update();
  }

  // update looks again if it is time.
  async update() {
    if (this.busy || performance.now() < this.next) return;
    this.busy = true;
    this.next = performance.now() + every;
    const what = by('top-by').value, ids = this.blocks();
    try {
      this.show(what, await get('/v1/top', {by: what, limit, ...(ids && {block: ids})}));
    } catch (error) {
      this.rows('');
      by('top').replaceChildren(element('p', {}, error.message));
    } finally {
      this.busy = false;
      if (by('top-by').value !== what) this.now();
    }
  }

  show(what, reply) {
    const items = reply.blocks.flatMap(block => block.items.map(item => ({...item, share: block.total ? Math.min(item.count / block.total, 1) : null})))
      .sort((a, b) => b.count - a.count).slice(0, limit);
    const columns = [[what === 'clients' ? 'client' : 'name', 'name'], ['type'], ['times', 'number'], ['share', 'number']];
    const text = JSON.stringify([what, items]);
    if (!this.rows(text)) return;
    by('top').replaceChildren(items.length ? table(columns, items.map(item => [
      what === 'clients' ? item.client : this.link(item), item.type || '', number(item.count), percent(item.share),
    ])) : element('p', {}, 'Nothing has been counted yet.'));
  }

  // rows returns whether the table is another one. A table that stays is left alone while it has the keyboard.
  rows(text) {
    const other = this.text !== text && !by('top').querySelector(':focus');
    if (other) this.text = text;
    return other;
  }

  link(item) {
    const button = element('button', {type: 'button', className: 'link'}, item.name);
    button.addEventListener('click', () => this.find(item.name, item.type));
    return button;
  }
}
