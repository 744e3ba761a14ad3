/**
 * Program: scores of a server as JSON lines.
 *
 *     node main.js ADDRESS QUERY DOCUMENT...       one ranking, best document first
 *     node main.js ADDRESS --grid < texts.json     {"queries": [...], "documents": [...]}; one row of scores for each query
 *
 * RERANKER_CLIENT_TOKEN, RERANKER_CLIENT_TLS_CA, RERANKER_CLIENT_TLS_CERT and RERANKER_CLIENT_TLS_KEY have the meaning
 * that they have for the Python client.
 */

import { readFileSync } from 'node:fs';
import { connect, rerank, scoreGrid } from './client.js';

const [address, query, ...documents] = process.argv.slice(2);
if (!query) {
  console.error('Usage: node main.js ADDRESS QUERY DOCUMENT..., or node main.js ADDRESS --grid < texts.json');
  process.exit(2);
}
const client = connect(address, {
  token: process.env.RERANKER_CLIENT_TOKEN,
  ca: process.env.RERANKER_CLIENT_TLS_CA,
  cert: process.env.RERANKER_CLIENT_TLS_CERT,
  key: process.env.RERANKER_CLIENT_TLS_KEY,
});
try {
  if (query === '--grid') {
    const texts = JSON.parse(readFileSync(0, 'utf8'));
    const rows = await scoreGrid(client, texts.queries, texts.documents, { queriesPerChunk: 2 });
    for (const row of rows) console.log(JSON.stringify([...row]));
  } else {
    const { results } = await rerank(client, { query, documents });
    for (const { index, score } of results) console.log(JSON.stringify({ index, score }));
  }
} catch (error) {
  console.error(`${error.name}: ${error.message}`);
  process.exitCode = 1;
} finally {
  client.close();
}
