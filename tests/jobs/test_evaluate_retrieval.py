"""Tasks of retrieval end to end: what they write, which models can do them, and the paper's vision tower."""

import json
import os
import shutil
import subprocess
import sys

import jax
import miniature_benchmarks as miniature
import numpy as np
import pytest
import tiny_models
import tiny_retrieval

import sparselora_jax as sl
from sparselora_jax.checkpoints import graft
from sparselora_jax.data.benchmarks.load import load
from sparselora_jax.evaluation.tasks import TASKS, find_task
from sparselora_jax.jobs import evaluate_tasks
from sparselora_jax.jobs.evaluate_tasks import TaskRequest
from sparselora_jax.models import blip2, blip2_retrieval
from sparselora_jax.runtime.errors import DataError, UnsupportedModelError

NAMES = ('flickr30k_test_retrieval', 'coco_karpathy_test_retrieval')
LARGE = 56  # pixels of an image of the retrieval model; a BLIP-2 here has 28


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A retrieval model, a BLIP-2, and data."""
    folder = tmp_path_factory.mktemp('retrieval')
    tiny_retrieval.save(folder / 'model', LARGE)
    tiny_models.save('blip2-t5', folder / 'blip2')
    miniature.karpathy(folder / 'data' / 'dataset_flickr30k.json', folder / 'data', 'flickr30k', ('test',) * 4)
    miniature.karpathy(folder / 'data' / 'dataset_coco.json', folder / 'data', 'coco', ('test', 'val', 'test'))
    for file in (folder / 'data').glob('*.json'):
        tiny_retrieval.write_captions(file)
    return folder


@pytest.fixture(scope='module')
def loaded(folder):
    model, params = sl.load_model(folder / 'model', dtype='float32')
    return model, params, sl.load_processor(folder / 'model')


def run(folder, output, loaded, tasks=NAMES, **options):
    """Score as launch/evaluate.py does."""
    request = TaskRequest(tasks=tasks, data_root=folder / 'data', batch=2, **options)
    known = evaluate_tasks.load_tasks(request)
    model, params, processor = loaded
    prepared = evaluate_tasks.prepare(request, known, model, processor)
    owner = evaluate_tasks.begin(output, {}, known)
    return evaluate_tasks.evaluate_tasks(
        request, prepared, model, params, processor, output=output, name='tiny', owner=owner
    )


@pytest.mark.slow
def test_recalls_and_searches_are_written(folder, tmp_path, loaded):
    results = run(folder, tmp_path, loaded, candidates=3)
    written = json.loads((tmp_path / 'results.json').read_text())
    assert written['config']['candidates'] == 3
    for name, images in zip(NAMES, (4, 2), strict=True):
        recalls = [f'{kind}_R@{depth}' for kind in ('text', 'image') for depth in (1, 5, 10)]
        assert {*recalls, *(f'{recall}_stderr' for recall in recalls)} <= written['results'][name].keys()
        assert written['n'][name]['scored'] == images
        assert any('but the benchmark has' in note for note in written['notes'][name])
        samples = [json.loads(line) for line in (tmp_path / f'samples_{name}.jsonl').read_text().splitlines()]
        assert len(samples) == images
        # What is written gives the recalls again.
        found = [sample['predictions'][0] in sample['references'] for sample in samples]
        assert results[name].values['text_R@1'] == pytest.approx(100 * np.mean(found))
        assert [sample['score'] for sample in samples] == found
        best = [(row[0], sample['id']) for sample in samples for row in sample['images_of_references']]
        assert results[name].values['image_R@1'] == pytest.approx(100 * np.mean([image == own for image, own in best]))
    assert evaluate_tasks.table(results)[0].split()[1] == 'text_R@1'
    # The same command reads what is there; with another number of candidates, the file is of another run.
    again = run(folder, tmp_path, loaded, candidates=3)
    assert again[NAMES[0]].values == results[NAMES[0]].values
    with pytest.raises(sl.StorageError, match='of another run'):
        run(folder, tmp_path, loaded, candidates=2)
    # A limit leaves images out, and with them their captions.
    limited = run(folder, tmp_path / 'limited', loaded, NAMES[:1], limit=2, offset=1)
    assert limited[NAMES[0]].scored == 2
    lines = (tmp_path / 'limited' / f'samples_{NAMES[0]}.jsonl').read_text().splitlines()
    assert [len(json.loads(line)['predictions']) for line in lines] == [10, 10]


def test_a_model_that_cannot_do_a_task_is_refused():
    tasks = {name: find_task(name) for name in TASKS}
    with pytest.raises(UnsupportedModelError, match=f'{NAMES[0]}: blip2 models answer in text; .* give a retrieval'):
        evaluate_tasks.check_kinds(tasks, blip2.BLIP2)
    with pytest.raises(UnsupportedModelError, match='gqa: blip2_retrieval models compare images with texts'):
        evaluate_tasks.check_kinds({'gqa': find_task('gqa')}, blip2_retrieval.FAMILY)


@pytest.mark.slow
def test_a_file_of_ones_own_gives_the_recalls_of_the_benchmark(folder, tmp_path, loaded):
    published = run(folder, tmp_path / 'published', loaded, NAMES[:1])[NAMES[0]]
    items = load(find_task(NAMES[0]).benchmark, folder / 'data')
    lines = []
    for item in items:
        image = os.path.relpath(item.image.name, folder / 'data')
        lines.append({'image': image, 'references': list(item.references), 'metric': 'retrieval'})
    file = folder / 'data' / 'mine.jsonl'
    try:
        miniature.write(file, lines)
        own = run(folder, tmp_path / 'own', loaded, (str(file),))[str(file)]
        assert own.headline == 'text_R@1'
        assert own.values == published.values
        # An item is an image of its own, so the captions of the other line would count as wrong.
        miniature.write(file, [*lines, lines[1]])
        with pytest.raises(DataError, match=r'mine\.jsonl: image .* is in 2 lines; put all its captions into one'):
            run(folder, tmp_path / 'twice', loaded, (str(file),))
    finally:
        file.unlink()


@pytest.mark.slow
def test_what_a_search_has_no_use_for_is_refused(folder, tmp_path, loaded):
    for options, word in (({'prompt': 'a {}'}, 'prompt'), ({'overrides': {'num_beams': 2}}, 'num_beams')):
        with pytest.raises(DataError, match=f'{NAMES[0]}: {word} is for models that answer in text'):
            run(folder, tmp_path / 'out', loaded, **options)
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_the_vision_tower_of_a_blip2_takes_the_place_of_the_models_own(folder, loaded):
    model, params, _ = loaded
    other, theirs = sl.load_model(folder / 'blip2', dtype='float32')
    tower, read = graft.load_tower(folder / 'blip2', 'vision', dtype='float32')
    assert tower.cfg == other.cfg
    jax.tree.map(np.testing.assert_array_equal, read, theirs['vision'])
    mixed = graft.with_vision_from(model, params, folder / 'blip2', dtype='float32')
    jax.tree.map(np.testing.assert_array_equal, mixed['vision']['blocks'], theirs['vision']['blocks'])
    # The norm behind the tower, and everything else, stays that of the retrieval model.
    jax.tree.map(np.testing.assert_array_equal, mixed['vision']['norm'], params['vision']['norm'])
    jax.tree.map(np.testing.assert_array_equal, mixed['qformer'], params['qformer'])
    assert mixed['vision']['positions'].shape == params['vision']['positions'].shape


@pytest.mark.slow
def test_a_vision_tower_that_does_not_fit_is_named(folder, tmp_path, loaded):
    model, params, _ = loaded
    tiny_models.save('llava-default', tmp_path / 'llava')
    with pytest.raises(UnsupportedModelError, match=r'llava: its vision/.* has the shape .* BLIP-2 or InstructBLIP'):
        graft.with_vision_from(model, params, tmp_path / 'llava')
    with pytest.raises(UnsupportedModelError, match='blip2: blip2 models have no audio tower'):
        graft.load_tower(folder / 'blip2', 'audio')


@pytest.mark.slow
@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('layer_norm_eps', 1e-3, 'norm_eps 0.001'),
        ('hidden_act', 'relu', "activation 'relu'"),
        ('num_attention_heads', 1, 'heads 1'),
    ],
)
def test_a_vision_tower_that_computes_otherwise_is_named(field, value, message, folder, tmp_path, loaded):
    model, params, _ = loaded
    shutil.copytree(folder / 'blip2', tmp_path / 'other')
    config = json.loads((tmp_path / 'other' / 'config.json').read_text())
    assert config['vision_config'][field] != value
    config['vision_config'][field] = value
    (tmp_path / 'other' / 'config.json').write_text(json.dumps(config))
    # The weights have the same shapes, so nothing else would tell.
    with pytest.raises(UnsupportedModelError, match=f'other: its vision tower has {message}, and that of .*: give'):
        graft.with_vision_from(model, params, tmp_path / 'other')


@pytest.mark.slow
def test_two_scripts_cannot_write_one_folder_of_results(folder, tmp_path, script):
    arguments = [f'--model={folder / "model"}', f'--tasks={NAMES[0]}', f'--data_root={folder / "data"}', '--batch=2']
    command = 'import sys; from pathlib import Path; from sparselora_jax.runtime import files; '
    command += 'files.hold(Path(sys.argv[1])); print(1, flush=True); sys.stdin.read()'
    other = [sys.executable, '-c', command, str(tmp_path)]
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b'1\n'
        code, _, err = script('evaluate.py', *arguments, f'--output={tmp_path}')
        holder.kill()
    assert code == 1
    assert f'error: {tmp_path}: another run is in it (process {holder.pid} on ' in err
    assert not list(tmp_path.glob('*.json*'))


@pytest.mark.slow
def test_the_script_scores_the_paper_s_hybrid_and_says_so(folder, tmp_path, script):
    code, out, err = script(
        'evaluate.py',
        f'--model={folder / "model"}',
        f'--vision_from={folder / "blip2"}',
        f'--tasks={NAMES[0]}',
        f'--data_root={folder / "data"}',
        f'--output={tmp_path}',
        '--batch=2',
    )
    assert code == 0, err
    assert 'text_R@1' in out
    assert f'{NAMES[0]}: pairs 80/80' in err
    (note,) = [n for n in json.loads((tmp_path / 'results.json').read_text())['notes'][NAMES[0]] if 'vision' in n]
    assert 'pruning its language tower cannot change it' in note


@pytest.mark.slow
def test_scripts_that_ask_for_text_refuse_the_model(folder, script):
    model = f'--model={folder / "model"}'
    picture = next((folder / 'data').rglob('*.jpg'))
    for arguments in (('generate.py', picture, 'is it red?', model), ('evaluate.py', model, '--data=easy_vqa')):
        code, _, err = script(*arguments)
        assert code == 1
        assert 'blip2_retrieval models compare images with texts' in err
    code, out, _ = script('inspect.py', folder / 'model')
    assert code == 0
    assert 'match_head' in out
    assert 'no recipe for blip2_retrieval models' in out
