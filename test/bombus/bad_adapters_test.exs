defmodule Bombus.BadAdaptersTest do
  # Every line of "Adapters": refused at load, or when it is first used with a model it does not
  # fit; the model still answers without it.
  use ExUnit.Case, async: true

  alias Bombus.{Error, Fixtures, Serving}

  @moduletag :tmp_dir
  @tensors "adapters.safetensors"
  @config "adapter_config.json"

  setup_all {Fixtures, :answering_model}

  setup %{tmp_dir: dir} do
    %{folder: Fixtures.copy(Fixtures.adapter("f32-tied", "last-qv"), dir)}
  end

  defp assert_refused_at_load(folder, reason, words) do
    assert {:error, %Error{} = error} = Bombus.load_adapter({:local, folder})
    assert error.reason == reason, Exception.message(error)
    for word <- List.wrap(words), do: assert(error.message =~ word)
  end

  defp assert_refused_at_use(%{model: model, before: before}, folder, words) do
    adapter = Bombus.load_adapter!({:local, folder})
    assert {:error, %Error{reason: :bad_adapter} = error} = score(model, adapter)
    for word <- List.wrap(words), do: assert(error.message =~ word)

    serving = Serving.new(model, nil, adapter: adapter, max_new_tokens: 2)
    inputs = [%{token_ids: [1, 2]}, %{token_ids: [1, 2], adapter: nil}]
    assert [{:error, ^error}, %{results: [_one]}] = Serving.run(serving, inputs)
    assert Bombus.score(model, [1, 2, 3, 4]) == {:ok, before}
  end

  defp score(model, adapter), do: Bombus.score(model, [1, 2, 3, 4], adapter: adapter)

  defp edit(folder, fun), do: Fixtures.edit_tensor_list(folder, @tensors, fun)

  test "of another base model", %{tmp_dir: dir} = context do
    folder = Fixtures.copy(Fixtures.adapter("bf16-4bit", "all-layers"), dir)
    assert_refused_at_use(context, folder, ["does not fit", "model.layers.0.self_attn.q_proj"])
  end

  test "with the wrong rank", %{folder: folder} = context do
    Fixtures.edit_json(folder, @config, &put_in(&1["lora_parameters"]["rank"], 8))
    assert_refused_at_use(context, folder, ["q_proj.lora_a", "v_proj.lora_b"])
  end

  test "in the wrong orientation", %{folder: folder} = context do
    edit(folder, fn tensors ->
      for {name, dtype, [rows, columns], data} <- tensors do
        {name, dtype, [columns, rows], data}
      end
    end)

    assert_refused_at_use(context, folder, "shape [4, 64], expected a float of [64, 4]")
  end

  test "with layers that do not exist", %{folder: folder} = context do
    edit(folder, fn tensors ->
      for {name, dtype, shape, data} <- tensors do
        {String.replace(name, "layers.1", "layers.7"), dtype, shape, data}
      end
    end)

    # The error lists all of them.
    assert_refused_at_use(context, folder, [
      "model.layers.7.self_attn.q_proj",
      "model.layers.7.self_attn.v_proj"
    ])
  end

  test "with half of a pair", %{folder: folder} do
    edit(folder, fn tensors ->
      Enum.reject(tensors, &(elem(&1, 0) == "model.layers.1.self_attn.q_proj.lora_b"))
    end)

    assert_refused_at_load(folder, :bad_adapter, "model.layers.1.self_attn.q_proj.lora_b")
  end

  test "with a scale that is no number", %{folder: folder} do
    config = File.read!(Path.join(folder, @config))
    scale = ~r/"scale":\s*[\d.]+/

    for wrong <- ["NaN", "1e300", "\"20\"", "null"] do
      File.write!(
        Path.join(folder, @config),
        String.replace(config, scale, "\"scale\": #{wrong}")
      )

      assert_refused_at_load(folder, :bad_adapter, @config)
    end
  end

  test "with a scale of the caller's that is no number", %{folder: folder} do
    for scale <- [:nan, "20", 1.0e300, 10 ** 400] do
      assert_raise ArgumentError, ~r/:scale to be a number/, fn ->
        Bombus.load_adapter(folder, scale: scale)
      end
    end
  end

  test "whose product is no number", %{model: model, before: before} do
    adapter = Bombus.load_adapter!(Fixtures.adapter("f32-tied", "all-layers"), scale: 1.0e38)
    assert {:error, %Error{reason: :backend} = error} = score(model, adapter)
    assert error.message =~ "not a finite number"
    serving = Serving.new(model, nil, adapter: adapter)
    assert {:error, %Error{reason: :backend}} = Serving.run(serving, %{token_ids: [1, 2]})
    assert Bombus.score(model, [1, 2, 3, 4]) == {:ok, before}
  end

  test "of DoRA, with and without m", %{tmp_dir: dir} do
    folder = Fixtures.copy(Fixtures.adapter("f32-tied", "dora"), dir)
    assert_refused_at_load(folder, :unsupported, "dora")

    edit(folder, fn tensors -> Enum.reject(tensors, &String.ends_with?(elem(&1, 0), ".m")) end)
    assert_refused_at_load(folder, :unsupported, "dora")
  end

  test "of an unknown kind", %{folder: folder} do
    for kind <- ["full", "mystery"] do
      Fixtures.edit_json(folder, @config, &Map.put(&1, "fine_tune_type", kind))
      assert_refused_at_load(folder, :unsupported, kind)
    end
  end

  test "with tensors of an unknown kind", %{folder: folder} do
    edit(folder, &[{"model.layers.0.self_attn.q_proj.m", "F32", [1], <<0::32>>} | &1])
    assert_refused_at_load(folder, :bad_adapter, "model.layers.0.self_attn.q_proj.m")
  end

  test "in PEFT's format", %{folder: folder} do
    File.rename!(Path.join(folder, @tensors), Path.join(folder, "adapter_model.safetensors"))
    assert_refused_at_load(folder, :unsupported, "PEFT")
  end

  test "that is missing, or lacks its config", %{folder: folder} do
    assert_refused_at_load(Path.join(folder, "nothing"), :not_found, "nothing")
    File.rm!(Path.join(folder, @config))
    assert_refused_at_load(folder, :not_found, @config)
    File.rm!(Path.join(folder, @tensors))
    assert_refused_at_load(folder, :not_found, @tensors)
  end

  test "without lora_parameters", %{folder: folder} do
    Fixtures.edit_json(folder, @config, &Map.delete(&1, "lora_parameters"))
    assert_refused_at_load(folder, :bad_adapter, "lora_parameters")
  end

  test "whose file is broken", %{folder: folder} do
    File.write!(Path.join(folder, @tensors), "broken")
    assert_refused_at_load(folder, :bad_checkpoint, @tensors)
  end

  test "a scale of one's own counts", %{folder: folder, model: model, before: before} do
    adapter = Bombus.load_adapter!(folder, scale: 0)
    assert adapter.scale == 0.0
    assert score(model, adapter) == {:ok, before}
    assert score(model, Bombus.load_adapter!(folder)) != {:ok, before}
  end
end
