-- The job store as schema 1 left it, with a job in every state. SQLite and PostgreSQL both read this; it is never edited.
CREATE TABLE numbers (
    name TEXT NOT NULL,
    value BIGINT NOT NULL,
    PRIMARY KEY (name)
);
CREATE TABLE jobs (
    id TEXT NOT NULL,
    kind TEXT NOT NULL,
    owner TEXT NOT NULL,
    state TEXT NOT NULL,
    progress INTEGER NOT NULL,
    request TEXT NOT NULL,
    created_at DOUBLE PRECISION NOT NULL,
    started_at DOUBLE PRECISION,
    completed_at DOUBLE PRECISION,
    expires_at DOUBLE PRECISION,
    error TEXT,
    outputs TEXT NOT NULL,
    result TEXT NOT NULL,
    parent TEXT,
    cancelled BOOLEAN NOT NULL,
    place BIGINT NOT NULL,
    worker TEXT,
    lease_until DOUBLE PRECISION,
    attempt INTEGER NOT NULL,
    crashes INTEGER NOT NULL,
    key TEXT,
    fingerprint TEXT,
    PRIMARY KEY (id)
);
CREATE INDEX jobs_fingerprint ON jobs (owner, fingerprint);
CREATE INDEX jobs_key ON jobs (owner, key);
CREATE INDEX jobs_owner_page ON jobs (owner, kind, created_at, id);
CREATE INDEX jobs_page ON jobs (kind, created_at, id);
CREATE INDEX jobs_queue ON jobs (state, place);
CREATE TABLE events (
    sequence BIGINT NOT NULL,
    job TEXT NOT NULL,
    owner TEXT NOT NULL,
    type TEXT NOT NULL,
    at DOUBLE PRECISION NOT NULL,
    facts TEXT NOT NULL,
    PRIMARY KEY (sequence)
);
CREATE INDEX events_age ON events (type, at);
CREATE INDEX events_job ON events (job, sequence);
CREATE INDEX events_owner ON events (owner, sequence);
CREATE TABLE workers (
    id TEXT NOT NULL,
    facts TEXT NOT NULL,
    seen DOUBLE PRECISION NOT NULL,
    job TEXT,
    PRIMARY KEY (id)
);
CREATE TABLE documents (
    collection TEXT NOT NULL,
    id TEXT NOT NULL,
    owner TEXT NOT NULL,
    put_at DOUBLE PRECISION NOT NULL,
    document TEXT NOT NULL,
    PRIMARY KEY (collection, id)
);
INSERT INTO numbers (name, value) VALUES ('schema', 1);
INSERT INTO numbers (name, value) VALUES ('events', 24);
INSERT INTO numbers (name, value) VALUES ('paused', 0);
INSERT INTO jobs (id, kind, owner, state, progress, request, created_at, started_at, completed_at, expires_at, error, outputs, result, parent, cancelled, place, worker, lease_until, attempt, crashes, key, fingerprint) VALUES ('video_hmi2ncgnkw84g7vsuod6v1or0s', 'video', 'local', 'completed', 100, '{"task":"create","prompt":"a red ball bounces twice","model":"sora-2","system":"worlds-64","size":[720,1280],"seconds":4.0,"seed":7,"steps":null,"guidance":null,"expand":true,"loop":false,"strength":null,"frames":null,"inputs":[],"shots":null,"characters":[],"n":1,"format":"mp4","mode":null}', 1790000001.5, 1790000002.0, 1790000002.5, NULL, NULL, '[{"id":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","role":"video","media":"video/mp4","bytes":1000}]', '{"seed":7,"frames":17,"fps":8.0}', NULL, FALSE, 1, NULL, NULL, 1, 0, 'wish 1', 'f1');
INSERT INTO jobs (id, kind, owner, state, progress, request, created_at, started_at, completed_at, expires_at, error, outputs, result, parent, cancelled, place, worker, lease_until, attempt, crashes, key, fingerprint) VALUES ('video_hmi2nd7g34vzemeeti1qz6bi7l', 'video', 'anna', 'failed', 0, '{"task":"create","prompt":"a blue box \u00fc slides","model":"sora-2","system":"worlds-64","size":[720,1280],"seconds":4.0,"seed":7,"steps":null,"guidance":null,"expand":true,"loop":false,"strength":null,"frames":null,"inputs":[],"shots":null,"characters":[],"n":1,"format":"mp4","mode":null}', 1790000002.75, 1790000003.25, 1790000003.5, NULL, '{"code":"invalid_request","message":"It cannot be made."}', '[]', '{}', NULL, FALSE, 6, NULL, NULL, 1, 0, NULL, 'f2');
INSERT INTO jobs (id, kind, owner, state, progress, request, created_at, started_at, completed_at, expires_at, error, outputs, result, parent, cancelled, place, worker, lease_until, attempt, crashes, key, fingerprint) VALUES ('image_hmi2ndsvowwrwcjivwp2ufpqbn', 'image', 'anna', 'queued', 0, '{"task":"image","prompt":"a picture","model":"sora-2","system":"worlds-64","size":[720,1280],"seconds":4.0,"seed":7,"steps":null,"guidance":null,"expand":true,"loop":false,"strength":null,"frames":null,"inputs":[],"shots":null,"characters":[],"n":1,"format":"png","mode":null}', 1790000003.75, NULL, NULL, NULL, NULL, '[]', '{}', NULL, FALSE, 10, NULL, NULL, 0, 0, NULL, NULL);
INSERT INTO jobs (id, kind, owner, state, progress, request, created_at, started_at, completed_at, expires_at, error, outputs, result, parent, cancelled, place, worker, lease_until, attempt, crashes, key, fingerprint) VALUES ('video_hmi2ndy8lczn5sw6axpnv1u2jp', 'video', 'local', 'in_progress', 30, '{"task":"create","prompt":"it is eaten","model":"sora-2","system":"worlds-64","size":[720,1280],"seconds":4.0,"seed":7,"steps":null,"guidance":null,"expand":true,"loop":false,"strength":null,"frames":null,"inputs":[{"role":"video","asset":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","media":"video/mp4"}],"shots":null,"characters":[],"n":1,"format":"mp4","mode":null}', 1790000004.0, 1790000004.5, NULL, NULL, NULL, '[{"id":"bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","role":"preview","media":"image/jpeg","bytes":10}]', '{}', 'video_hmi2ncgnkw84g7vsuod6v1or0s', FALSE, 12, 'host-1', 1790000019.75, 1, 0, NULL, NULL);
INSERT INTO jobs (id, kind, owner, state, progress, request, created_at, started_at, completed_at, expires_at, error, outputs, result, parent, cancelled, place, worker, lease_until, attempt, crashes, key, fingerprint) VALUES ('video_hmi2nejo74aawe0cyzepwmmthz', 'video', 'anna', 'queued', 0, '{"task":"create","prompt":"a green ring falls","model":"sora-2","system":"worlds-64","size":[720,1280],"seconds":4.0,"seed":7,"steps":null,"guidance":null,"expand":true,"loop":false,"strength":null,"frames":null,"inputs":[],"shots":null,"characters":[],"n":1,"format":"mp4","mode":null}', 1790000005.0, NULL, NULL, NULL, NULL, '[]', '{}', NULL, FALSE, 17, NULL, NULL, 0, 0, NULL, NULL);
INSERT INTO jobs (id, kind, owner, state, progress, request, created_at, started_at, completed_at, expires_at, error, outputs, result, parent, cancelled, place, worker, lease_until, attempt, crashes, key, fingerprint) VALUES ('video_hmi2nezqwgmqm0yylt1ebzb5zg', 'video', 'local', 'failed', 0, '{"task":"create","prompt":"not wanted","model":"sora-2","system":"worlds-64","size":[720,1280],"seconds":4.0,"seed":7,"steps":null,"guidance":null,"expand":true,"loop":false,"strength":null,"frames":null,"inputs":[],"shots":null,"characters":[],"n":1,"format":"mp4","mode":null}', 1790000005.75, NULL, 1790000006.0, NULL, '{"code":"cancelled","message":"The job was cancelled."}', '[]', '{}', NULL, TRUE, 22, NULL, NULL, 0, 0, NULL, NULL);
INSERT INTO events (sequence, job, owner, type, at, facts) VALUES (2, 'video_hmi2ncgnkw84g7vsuod6v1or0s', 'local', 'video.queued', 1790000001.5, '{"type":"video.queued","id":"video_hmi2ncgnkw84g7vsuod6v1or0s","kind":"video","state":"queued","progress":0,"attempt":0,"cancelled":false,"error":null,"created_at":1790000001.5,"at":1790000001.5}');
INSERT INTO events (sequence, job, owner, type, at, facts) VALUES (3, 'video_hmi2ncgnkw84g7vsuod6v1or0s', 'local', 'video.in_progress', 1790000002.0, '{"type":"video.in_progress","id":"video_hmi2ncgnkw84g7vsuod6v1or0s","kind":"video","state":"in_progress","progress":0,"attempt":1,"cancelled":false,"error":null,"created_at":1790000001.5,"at":1790000002.0}');
INSERT INTO events (sequence, job, owner, type, at, facts) VALUES (4, 'video_hmi2ncgnkw84g7vsuod6v1or0s', 'local', 'video.progress', 1790000002.25, '{"type":"video.progress","id":"video_hmi2ncgnkw84g7vsuod6v1or0s","kind":"video","state":"in_progress","progress":50,"attempt":1,"cancelled":false,"error":null,"created_at":1790000001.5,"at":1790000002.25}');
INSERT INTO events (sequence, job, owner, type, at, facts) VALUES (5, 'video_hmi2ncgnkw84g7vsuod6v1or0s', 'local', 'video.completed', 1790000002.5, '{"type":"video.completed","id":"video_hmi2ncgnkw84g7vsuod6v1or0s","kind":"video","state":"completed","progress":100,"attempt":1,"cancelled":false,"error":null,"created_at":1790000001.5,"at":1790000002.5}');
INSERT INTO events (sequence, job, owner, type, at, facts) VALUES (7, 'video_hmi2nd7g34vzemeeti1qz6bi7l', 'anna', 'video.queued', 1790000002.75, '{"type":"video.queued","id":"video_hmi2nd7g34vzemeeti1qz6bi7l","kind":"video","state":"queued","progress":0,"attempt":0,"cancelled":false,"error":null,"created_at":1790000002.75,"at":1790000002.75}');
INSERT INTO events (sequence, job, owner, type, at, facts) VALUES (8, 'video_hmi2nd7g34vzemeeti1qz6bi7l', 'anna', 'video.in_progress', 1790000003.25, '{"type":"video.in_progress","id":"video_hmi2nd7g34vzemeeti1qz6bi7l","kind":"video","state":"in_progress","progress":0,"attempt":1,"cancelled":false,"error":null,"created_at":1790000002.75,"at":1790000003.25}');
INSERT INTO events (sequence, job, owner, type, at, facts) VALUES (9, 'video_hmi2nd7g34vzemeeti1qz6bi7l', 'anna', 'video.failed', 1790000003.5, '{"type":"video.failed","id":"video_hmi2nd7g34vzemeeti1qz6bi7l","kind":"video","state":"failed","progress":0,"attempt":1,"cancelled":false,"error":{"code":"invalid_request","message":"It cannot be made."},"created_at":1790000002.75,"at":1790000003.5}');
INSERT INTO events (sequence, job, owner, type, at, facts) VALUES (11, 'image_hmi2ndsvowwrwcjivwp2ufpqbn', 'anna', 'video.queued', 1790000003.75, '{"type":"video.queued","id":"image_hmi2ndsvowwrwcjivwp2ufpqbn","kind":"image","state":"queued","progress":0,"attempt":0,"cancelled":false,"error":null,"created_at":1790000003.75,"at":1790000003.75}');
INSERT INTO events (sequence, job, owner, type, at, facts) VALUES (13, 'video_hmi2ndy8lczn5sw6axpnv1u2jp', 'local', 'video.queued', 1790000004.0, '{"type":"video.queued","id":"video_hmi2ndy8lczn5sw6axpnv1u2jp","kind":"video","state":"queued","progress":0,"attempt":0,"cancelled":false,"error":null,"created_at":1790000004.0,"at":1790000004.0}');
INSERT INTO events (sequence, job, owner, type, at, facts) VALUES (14, 'video_hmi2ndy8lczn5sw6axpnv1u2jp', 'local', 'video.in_progress', 1790000004.5, '{"type":"video.in_progress","id":"video_hmi2ndy8lczn5sw6axpnv1u2jp","kind":"video","state":"in_progress","progress":0,"attempt":1,"cancelled":false,"error":null,"created_at":1790000004.0,"at":1790000004.5}');
INSERT INTO events (sequence, job, owner, type, at, facts) VALUES (15, 'video_hmi2ndy8lczn5sw6axpnv1u2jp', 'local', 'video.progress', 1790000004.75, '{"type":"video.progress","id":"video_hmi2ndy8lczn5sw6axpnv1u2jp","kind":"video","state":"in_progress","progress":30,"attempt":1,"cancelled":false,"error":null,"created_at":1790000004.0,"at":1790000004.75}');
INSERT INTO events (sequence, job, owner, type, at, facts) VALUES (16, 'video_hmi2ndy8lczn5sw6axpnv1u2jp', 'local', 'video.preview', 1790000004.75, '{"type":"video.preview","id":"video_hmi2ndy8lczn5sw6axpnv1u2jp","kind":"video","state":"in_progress","progress":30,"attempt":1,"cancelled":false,"error":null,"created_at":1790000004.0,"at":1790000004.75}');
INSERT INTO events (sequence, job, owner, type, at, facts) VALUES (18, 'video_hmi2nejo74aawe0cyzepwmmthz', 'anna', 'video.queued', 1790000005.0, '{"type":"video.queued","id":"video_hmi2nejo74aawe0cyzepwmmthz","kind":"video","state":"queued","progress":0,"attempt":0,"cancelled":false,"error":null,"created_at":1790000005.0,"at":1790000005.0}');
INSERT INTO events (sequence, job, owner, type, at, facts) VALUES (21, 'video_hmi2nep13k0ow8xzdr3unzcwqv', 'local', 'video.deleted', 1790000005.5, '{"type":"video.deleted","id":"video_hmi2nep13k0ow8xzdr3unzcwqv","kind":"video","state":"queued","progress":0,"attempt":0,"cancelled":false,"error":null,"created_at":1790000005.25,"at":1790000005.5}');
INSERT INTO events (sequence, job, owner, type, at, facts) VALUES (23, 'video_hmi2nezqwgmqm0yylt1ebzb5zg', 'local', 'video.queued', 1790000005.75, '{"type":"video.queued","id":"video_hmi2nezqwgmqm0yylt1ebzb5zg","kind":"video","state":"queued","progress":0,"attempt":0,"cancelled":false,"error":null,"created_at":1790000005.75,"at":1790000005.75}');
INSERT INTO events (sequence, job, owner, type, at, facts) VALUES (24, 'video_hmi2nezqwgmqm0yylt1ebzb5zg', 'local', 'video.failed', 1790000006.0, '{"type":"video.failed","id":"video_hmi2nezqwgmqm0yylt1ebzb5zg","kind":"video","state":"failed","progress":0,"attempt":0,"cancelled":true,"error":{"code":"cancelled","message":"The job was cancelled."},"created_at":1790000005.75,"at":1790000006.0}');
INSERT INTO workers (id, facts, seen, job) VALUES ('host-1', '{"system":"worlds-64","device":"cpu","pid":1}', 1790000004.75, 'video_hmi2ndy8lczn5sw6axpnv1u2jp');
INSERT INTO documents (collection, id, owner, put_at, document) VALUES ('webhook_endpoint', 'whe_1', 'local', 1790000001.0, '{"id":"whe_1","url":"https://hooks.example/","enabled":true,"event_types":["video.completed"]}');
INSERT INTO documents (collection, id, owner, put_at, document) VALUES ('file', 'file_1', 'anna', 1790000001.25, '{"id":"file_1","asset":"eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee"}');
INSERT INTO documents (collection, id, owner, put_at, document) VALUES ('outbox', 'wh_hmi2nd236ohe6k111y0odr1xes', 'local', 1790000002.5, '{"id":"wh_hmi2nd236ohe6k111y0odr1xes","endpoint":"whe_1","owner":"local","type":"video.completed","job":"video_hmi2ncgnkw84g7vsuod6v1or0s","created_at":1790000002.5,"tries":0,"due":1790000002.5}');
