// This file asks the server.

const tokenKey = 'optcache token';

// Problem is an answer of the server that is no success.
export class Problem extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

// setToken keeps the token for this tab, until it is closed.
export function setToken(token) {
  sessionStorage.setItem(tokenKey, token);
}

async function request(path, init = {}) {
  const headers = {...init.headers};
  const token = sessionStorage.getItem(tokenKey);
  if (token) headers.Authorization = 'Bearer ' + token;
  const response = await fetch(path, {...init, headers, cache: 'no-store', redirect: 'error'});
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  throw new Problem(response.status, problem.detail || response.statusText || 'status ' + response.status);
}

// get returns what the server answers. params has values by name; one may be a list.
export async function get(path, params = {}, signal) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(params)) {
    for (const one of [].concat(value)) query.append(name, one);
  }
  const text = query.toString();
  return (await request(text ? path + '?' + text : path, {signal})).json();
}

export async function post(path, body) {
  const response = await request(path, {
    method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify(body),
  });
  return response.json();
}

// events yields the data of each event of the server. It is no EventSource, because that sends no token.
export async function* events(signal) {
  const response = await request('/v1/events', {signal, headers: {Accept: 'text/event-stream'}});
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const all = (rest + value).split('\n\n');
    rest = all.pop();
    for (const one of all) {
      const data = one.split('\n').filter(line => line.startsWith('data: ')).map(line => line.slice(6)).join('\n');
      if (data) yield JSON.parse(data);
    }
  }
}
