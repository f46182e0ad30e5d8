INSERT INTO public.event_counts (minute, site_id, events, last_id) VALUES ('2026-11-23 19:16:00+00', 'shop', 4, 4);
INSERT INTO public.event_counts (minute, site_id, events, last_id) VALUES ('2026-11-23 19:16:00+00', 'blog', 2, 6);
INSERT INTO public.event_counts (minute, site_id, events, last_id) VALUES ('2026-11-23 19:16:00+00', 'shop', 3, 9);
INSERT INTO public.event_counts (minute, site_id, events, last_id) VALUES ('2026-11-23 19:16:00+00', 'blog', 2, 11);
INSERT INTO public.event_counts (minute, site_id, events, last_id) VALUES ('2026-11-23 19:16:00+00', 'shop', 4, 15);
INSERT INTO public.events_log (id, event_id, event_type, session_id, visitor_id, site_id, "timestamp", url, path, user_agent, ip_address, raw_event_data, created_at, exported_at) VALUES (1, '01a209d6-ca6b-72dc-96b8-aebaf21056a4', 'pageview', NULL, 'v', 'shop', '2026-11-23 19:16:41.195532+00', 'https://shop.example.com/a/1', '/a/1', 'Python-urllib/3.11', '127.0.0.1', '{"n": 1, "url": "https://shop.example.com/a/1", "price": 0.1, "title": "größe   \"x\"", "siteId": "shop", "eventType": "pageview", "visitorId": "v"}', '2026-11-23 19:16:41.195532+00', '2026-11-23 19:16:42.17137+00');
INSERT INTO public.events_log (id, event_id, event_type, session_id, visitor_id, site_id, "timestamp", url, path, user_agent, ip_address, raw_event_data, created_at, exported_at) VALUES (2, '01a209d6-ca6b-75dc-9426-c6e2cf12bf35', 'pageview', NULL, 'v', 'shop', '2026-11-23 19:16:41.195532+00', 'https://shop.example.com/a/2', '/a/2', 'Python-urllib/3.11', '127.0.0.1', '{"n": 2, "url": "https://shop.example.com/a/2", "price": 0.1, "title": "größe   \"x\"", "siteId": "shop", "eventType": "pageview", "visitorId": "v"}', '2026-11-23 19:16:41.195532+00', '2026-11-23 19:16:42.17137+00');
INSERT INTO public.events_log (id, event_id, event_type, session_id, visitor_id, site_id, "timestamp", url, path, user_agent, ip_address, raw_event_data, created_at, exported_at) VALUES (3, '01a209d6-ca6b-7ffc-96a7-aae3516ac4de', 'pageview', NULL, 'v', 'shop', '2026-11-23 19:16:41.195532+00', 'https://shop.example.com/a/0', '/a/0', 'Python-urllib/3.11', '127.0.0.1', '{"n": 0, "url": "https://shop.example.com/a/0", "price": 0.1, "title": "größe   \"x\"", "siteId": "shop", "eventType": "pageview", "visitorId": "v"}', '2026-11-23 19:16:41.195532+00', '2026-11-23 19:16:42.17137+00');
INSERT INTO public.events_log (id, event_id, event_type, session_id, visitor_id, site_id, "timestamp", url, path, user_agent, ip_address, raw_event_data, created_at, exported_at) VALUES (4, '01a209d6-ca6c-73ee-8b2a-685298dca87f', 'pageview', NULL, 'v', 'shop', '2026-11-23 19:16:41.195532+00', 'https://shop.example.com/a/3', '/a/3', 'Python-urllib/3.11', '127.0.0.1', '{"n": 3, "url": "https://shop.example.com/a/3", "price": 0.1, "title": "größe   \"x\"", "siteId": "shop", "eventType": "pageview", "visitorId": "v"}', '2026-11-23 19:16:41.195532+00', '2026-11-23 19:16:42.17137+00');
INSERT INTO public.events_log (id, event_id, event_type, session_id, visitor_id, site_id, "timestamp", url, path, user_agent, ip_address, raw_event_data, created_at, exported_at) VALUES (5, '01a209d6-ca80-7454-b81b-a6e289c28128', 'pageview', NULL, 'v', 'blog', '2026-11-23 19:16:41.216279+00', 'https://blog.example.com/a/0', '/a/0', 'Python-urllib/3.11', '127.0.0.1', '{"n": 0, "url": "https://blog.example.com/a/0", "price": 0.1, "title": "größe   \"x\"", "siteId": "blog", "eventType": "pageview", "visitorId": "v"}', '2026-11-23 19:16:41.216279+00', '2026-11-23 19:16:42.17137+00');
INSERT INTO public.events_log (id, event_id, event_type, session_id, visitor_id, site_id, "timestamp", url, path, user_agent, ip_address, raw_event_data, created_at, exported_at) VALUES (6, '01a209d6-ca80-794a-ad17-7958e6fad732', 'pageview', NULL, 'v', 'blog', '2026-11-23 19:16:41.216279+00', 'https://blog.example.com/a/1', '/a/1', 'Python-urllib/3.11', '127.0.0.1', '{"n": 1, "url": "https://blog.example.com/a/1", "price": 0.1, "title": "größe   \"x\"", "siteId": "blog", "eventType": "pageview", "visitorId": "v"}', '2026-11-23 19:16:41.216279+00', '2026-11-23 19:16:42.17137+00');
INSERT INTO public.events_log (id, event_id, event_type, session_id, visitor_id, site_id, "timestamp", url, path, user_agent, ip_address, raw_event_data, created_at, exported_at) VALUES (7, '01a209d6-cec2-724d-8405-23f6684f051b', 'pageview', NULL, 'v', 'shop', '2026-11-23 19:16:42.30645+00', 'https://shop.example.com/a/2', '/a/2', 'Python-urllib/3.11', '127.0.0.1', '{"n": 2, "url": "https://shop.example.com/a/2", "price": 0.1, "title": "größe   \"x\"", "siteId": "shop", "eventType": "pageview", "visitorId": "v"}', '2026-11-23 19:16:42.30645+00', NULL);
INSERT INTO public.events_log (id, event_id, event_type, session_id, visitor_id, site_id, "timestamp", url, path, user_agent, ip_address, raw_event_data, created_at, exported_at) VALUES (8, '01a209d6-cec2-73b1-9090-9d9b6aaa95e3', 'pageview', NULL, 'v', 'shop', '2026-11-23 19:16:42.30645+00', 'https://shop.example.com/a/0', '/a/0', 'Python-urllib/3.11', '127.0.0.1', '{"n": 0, "url": "https://shop.example.com/a/0", "price": 0.1, "title": "größe   \"x\"", "siteId": "shop", "eventType": "pageview", "visitorId": "v"}', '2026-11-23 19:16:42.30645+00', NULL);
INSERT INTO public.events_log (id, event_id, event_type, session_id, visitor_id, site_id, "timestamp", url, path, user_agent, ip_address, raw_event_data, created_at, exported_at) VALUES (9, '01a209d6-cec2-754e-a140-0a325de59ac4', 'pageview', NULL, 'v', 'shop', '2026-11-23 19:16:42.30645+00', 'https://shop.example.com/a/1', '/a/1', 'Python-urllib/3.11', '127.0.0.1', '{"n": 1, "url": "https://shop.example.com/a/1", "price": 0.1, "title": "größe   \"x\"", "siteId": "shop", "eventType": "pageview", "visitorId": "v"}', '2026-11-23 19:16:42.30645+00', NULL);
INSERT INTO public.events_log (id, event_id, event_type, session_id, visitor_id, site_id, "timestamp", url, path, user_agent, ip_address, raw_event_data, created_at, exported_at) VALUES (10, '01a209d6-cece-7179-b06e-efea5790694d', 'pageview', NULL, 'v', 'blog', '2026-11-23 19:16:42.318116+00', 'https://blog.example.com/a/0', '/a/0', 'Python-urllib/3.11', '127.0.0.1', '{"n": 0, "url": "https://blog.example.com/a/0", "price": 0.1, "title": "größe   \"x\"", "siteId": "blog", "eventType": "pageview", "visitorId": "v"}', '2026-11-23 19:16:42.318116+00', NULL);
INSERT INTO public.events_log (id, event_id, event_type, session_id, visitor_id, site_id, "timestamp", url, path, user_agent, ip_address, raw_event_data, created_at, exported_at) VALUES (11, '01a209d6-cece-71f3-9b14-ad1f43a1b232', 'pageview', NULL, 'v', 'blog', '2026-11-23 19:16:42.318116+00', 'https://blog.example.com/a/1', '/a/1', 'Python-urllib/3.11', '127.0.0.1', '{"n": 1, "url": "https://blog.example.com/a/1", "price": 0.1, "title": "größe   \"x\"", "siteId": "blog", "eventType": "pageview", "visitorId": "v"}', '2026-11-23 19:16:42.318116+00', NULL);
INSERT INTO public.events_log (id, event_id, event_type, session_id, visitor_id, site_id, "timestamp", url, path, user_agent, ip_address, raw_event_data, created_at, exported_at) VALUES (12, '01a209d6-d248-734e-b444-ab8c399d059b', 'pageview', NULL, 'v', 'shop', '2026-11-23 19:16:43.208005+00', 'https://shop.example.com/a/1', '/a/1', 'Python-urllib/3.11', '127.0.0.1', '{"n": 1, "url": "https://shop.example.com/a/1", "price": 0.1, "title": "größe   \"x\"", "siteId": "shop", "eventType": "pageview", "visitorId": "v"}', '2026-11-23 19:16:43.208005+00', NULL);
INSERT INTO public.events_log (id, event_id, event_type, session_id, visitor_id, site_id, "timestamp", url, path, user_agent, ip_address, raw_event_data, created_at, exported_at) VALUES (13, '01a209d6-d248-7a90-870a-5b269fd0ee66', 'pageview', NULL, 'v', 'shop', '2026-11-23 19:16:43.208005+00', 'https://shop.example.com/a/0', '/a/0', 'Python-urllib/3.11', '127.0.0.1', '{"n": 0, "url": "https://shop.example.com/a/0", "price": 0.1, "title": "größe   \"x\"", "siteId": "shop", "eventType": "pageview", "visitorId": "v"}', '2026-11-23 19:16:43.208005+00', NULL);
INSERT INTO public.events_log (id, event_id, event_type, session_id, visitor_id, site_id, "timestamp", url, path, user_agent, ip_address, raw_event_data, created_at, exported_at) VALUES (14, '01a209d6-d248-7e02-ba07-d0afa91b441f', 'pageview', NULL, 'v', 'shop', '2026-11-23 19:16:43.208005+00', 'https://shop.example.com/a/2', '/a/2', 'Python-urllib/3.11', '127.0.0.1', '{"n": 2, "url": "https://shop.example.com/a/2", "price": 0.1, "title": "größe   \"x\"", "siteId": "shop", "eventType": "pageview", "visitorId": "v"}', '2026-11-23 19:16:43.208005+00', NULL);
INSERT INTO public.events_log (id, event_id, event_type, session_id, visitor_id, site_id, "timestamp", url, path, user_agent, ip_address, raw_event_data, created_at, exported_at) VALUES (15, '01a209d6-d248-7efd-bba4-cf1f9097ec0d', 'pageview', NULL, 'v', 'shop', '2026-11-23 19:16:43.208005+00', 'https://shop.example.com/a/3', '/a/3', 'Python-urllib/3.11', '127.0.0.1', '{"n": 3, "url": "https://shop.example.com/a/3", "price": 0.1, "title": "größe   \"x\"", "siteId": "shop", "eventType": "pageview", "visitorId": "v"}', '2026-11-23 19:16:43.208005+00', NULL);
INSERT INTO public.export_batches (job, sequence, kind, sealed_at, row_count, format, compression, object_rows, object_bytes, schema_version, state, settled_at, manifest, manifest_sha256) VALUES ('acme', 1, 'batch', '2026-11-23 19:16:41.934628+00', 6, 'jsonl', 'gzip', 500000, 268435456, 1, 'settled', '2026-11-23 19:16:42.166149+00', '{
 "manifest_version": 1,
 "installation": "fce28529-9622-40c4-ba33-47b4fb168bd5",
 "kind": "batch",
 "job": "acme",
 "sequence": 1,
 "previous_sha256": null,
 "sealed_at": "2026-11-23T19:16:41.934628+00:00",
 "row_count": 6,
 "format": "jsonl",
 "compression": "gzip",
 "object_rows": 500000,
 "object_bytes": 268435456,
 "schema_version": 1,
 "ranges": [
  {
   "site": "*",
   "except_sites": [],
   "from_id": 0,
   "to_id": 6
  }
 ],
 "buckets": [
  {
   "name": "client",
   "prefix": "raw"
  },
  {
   "name": "vault",
   "prefix": "raw"
  }
 ],
 "objects": [
  {
   "key": "site=blog/date=2026-11-23/hour=19/acme-0000000001-0001.jsonl.gz",
   "row_count": 2,
   "bytes": 373,
   "sha256": "73fb1a63c5fd0cc71295d25487af3f34329e82dd93ff676fae872c24ea1c4678",
   "first_event": "2026-11-23T19:16:41.216279+00:00",
   "last_event": "2026-11-23T19:16:41.216279+00:00"
  },
  {
   "key": "site=shop/date=2026-11-23/hour=19/acme-0000000001-0002.jsonl.gz",
   "row_count": 4,
   "bytes": 443,
   "sha256": "c750f2a12651e364482bf006b2076362dcd6b203eebf7cde69ef1a2ab6b00fab",
   "first_event": "2026-11-23T19:16:41.195532+00:00",
   "last_event": "2026-11-23T19:16:41.195532+00:00"
  }
 ]
}
', '3d2dac28e58e34cbf478ad15d75d2cda14a2afb0038ac23d874fde02b270ab74');
INSERT INTO public.export_batches (job, sequence, kind, sealed_at, row_count, format, compression, object_rows, object_bytes, schema_version, state, settled_at, manifest, manifest_sha256) VALUES ('acme', 2, 'batch', '2026-11-23 19:16:42.754925+00', 5, 'jsonl', 'gzip', 500000, 268435456, 1, 'sealed', NULL, '{
 "manifest_version": 1,
 "installation": "fce28529-9622-40c4-ba33-47b4fb168bd5",
 "kind": "batch",
 "job": "acme",
 "sequence": 2,
 "previous_sha256": "3d2dac28e58e34cbf478ad15d75d2cda14a2afb0038ac23d874fde02b270ab74",
 "sealed_at": "2026-11-23T19:16:42.754925+00:00",
 "row_count": 5,
 "format": "jsonl",
 "compression": "gzip",
 "object_rows": 500000,
 "object_bytes": 268435456,
 "schema_version": 1,
 "ranges": [
  {
   "site": "*",
   "except_sites": [],
   "from_id": 6,
   "to_id": 11
  }
 ],
 "buckets": [
  {
   "name": "client",
   "prefix": "raw"
  },
  {
   "name": "vault",
   "prefix": "raw"
  }
 ],
 "objects": [
  {
   "key": "site=blog/date=2026-11-23/hour=19/acme-0000000002-0001.jsonl.gz",
   "row_count": 2,
   "bytes": 372,
   "sha256": "ed93a0bf81296c602a75a983d33985339822fc72ccefec90edcd27dfd33d5acb",
   "first_event": "2026-11-23T19:16:42.318116+00:00",
   "last_event": "2026-11-23T19:16:42.318116+00:00"
  },
  {
   "key": "site=shop/date=2026-11-23/hour=19/acme-0000000002-0002.jsonl.gz",
   "row_count": 3,
   "bytes": 406,
   "sha256": "8166052ea2937cb63872202f41b67b1bab06d279e6fe5949160f314d0d6d685f",
   "first_event": "2026-11-23T19:16:42.306450+00:00",
   "last_event": "2026-11-23T19:16:42.306450+00:00"
  }
 ]
}
', '4b89a40321b7148ba41df8172e483bdd1c60dda81e1fd618b959a785afdd7006');
INSERT INTO public.export_coverage (job, site, sealed_to, active) VALUES ('acme', '*', 11, true);
INSERT INTO public.export_deliveries (job, sequence, bucket, prefix, state, attempts, attempted_at, delivered_at, last_error) VALUES ('acme', 1, 'client', 'raw', 'delivered', 1, '2026-11-23 19:16:41.962185+00', '2026-11-23 19:16:42.163197+00', NULL);
INSERT INTO public.export_deliveries (job, sequence, bucket, prefix, state, attempts, attempted_at, delivered_at, last_error) VALUES ('acme', 1, 'vault', 'raw', 'delivered', 1, '2026-11-23 19:16:41.962185+00', '2026-11-23 19:16:42.164464+00', NULL);
INSERT INTO public.export_deliveries (job, sequence, bucket, prefix, state, attempts, attempted_at, delivered_at, last_error) VALUES ('acme', 2, 'vault', 'raw', 'pending', 0, NULL, NULL, 'bucket vault: /mnt/vault is not there: create or mount it');
INSERT INTO public.export_deliveries (job, sequence, bucket, prefix, state, attempts, attempted_at, delivered_at, last_error) VALUES ('acme', 2, 'client', 'raw', 'delivered', 1, '2026-11-23 19:16:42.768147+00', '2026-11-23 19:16:43.025842+00', NULL);
INSERT INTO public.export_marks (site, marked_to) VALUES ('*', 6);
INSERT INTO public.export_objects (job, sequence, part, key, row_count, bytes, sha256, first_event, last_event) VALUES ('acme', 1, 1, 'site=blog/date=2026-11-23/hour=19/acme-0000000001-0001.jsonl.gz', 2, 373, '73fb1a63c5fd0cc71295d25487af3f34329e82dd93ff676fae872c24ea1c4678', '2026-11-23 19:16:41.216279+00', '2026-11-23 19:16:41.216279+00');
INSERT INTO public.export_objects (job, sequence, part, key, row_count, bytes, sha256, first_event, last_event) VALUES ('acme', 1, 2, 'site=shop/date=2026-11-23/hour=19/acme-0000000001-0002.jsonl.gz', 4, 443, 'c750f2a12651e364482bf006b2076362dcd6b203eebf7cde69ef1a2ab6b00fab', '2026-11-23 19:16:41.195532+00', '2026-11-23 19:16:41.195532+00');
INSERT INTO public.export_objects (job, sequence, part, key, row_count, bytes, sha256, first_event, last_event) VALUES ('acme', 2, 1, 'site=blog/date=2026-11-23/hour=19/acme-0000000002-0001.jsonl.gz', 2, 372, 'ed93a0bf81296c602a75a983d33985339822fc72ccefec90edcd27dfd33d5acb', '2026-11-23 19:16:42.318116+00', '2026-11-23 19:16:42.318116+00');
INSERT INTO public.export_objects (job, sequence, part, key, row_count, bytes, sha256, first_event, last_event) VALUES ('acme', 2, 2, 'site=shop/date=2026-11-23/hour=19/acme-0000000002-0002.jsonl.gz', 3, 406, '8166052ea2937cb63872202f41b67b1bab06d279e6fe5949160f314d0d6d685f', '2026-11-23 19:16:42.30645+00', '2026-11-23 19:16:42.30645+00');
INSERT INTO public.export_ranges (job, sequence, site, except_sites, from_id, to_id) VALUES ('acme', 1, '*', '{}', 0, 6);
INSERT INTO public.export_ranges (job, sequence, site, except_sites, from_id, to_id) VALUES ('acme', 2, '*', '{}', 6, 11);
INSERT INTO public.export_runs (id, job, started_at, finished_at, outcome, batches, row_count, message) OVERRIDING SYSTEM VALUE VALUES (1, 'acme', '2026-11-23 19:16:41.919613+00', '2026-11-23 19:16:42.180305+00', 'done', 1, 6, '6 events in 1 batch delivered');
INSERT INTO public.export_runs (id, job, started_at, finished_at, outcome, batches, row_count, message) OVERRIDING SYSTEM VALUE VALUES (2, 'acme', '2026-11-23 19:16:42.746981+00', '2026-11-23 19:16:43.04044+00', 'failed', 0, 0, 'nothing new delivered; bucket vault: /mnt/vault is not there: create or mount it');
INSERT INTO public.installation (id, schema_version, created_at) VALUES ('fce28529-9622-40c4-ba33-47b4fb168bd5', 1, '2026-11-23 19:16:41.083556+00');
SELECT pg_catalog.setval('public.events_log_id_seq', 15, true);
SELECT pg_catalog.setval('public.export_runs_id_seq', 2, true);
