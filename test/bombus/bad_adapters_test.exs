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

  test "of DoRA without m, or with an m of the wrong shape", %{tmp_dir: dir} = context do
    folder = Fixtures.copy(Fixtures.adapter("f32-tied", "dora"), dir)

    edit(folder, fn tensors ->
      for {name, dtype, shape, data} <- tensors do
        if name =~ ~r/0.mlp.down_proj.m$/,
          do: {name, dtype, [div(hd(shape), 2)], binary_part(data, 0, div(byte_size(data), 2))},
          else: {name, dtype, shape, data}
      end
    end)

    assert_refused_at_use(context, folder, ["model.layers.0.mlp.down_proj.m", "[32]"])

    edit(folder, fn tensors -> Enum.reject(tensors, &(elem(&1, 0) =~ ~r/1.mlp.up_proj.m$/)) end)
    assert_refused_at_load(folder, :bad_adapter, ["magnitude", "model.layers.1.mlp.up_proj"])
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

  describe "in PEFT's format" do
    setup %{tmp_dir: dir} do
      %{folder: Fixtures.copy(Fixtures.adapter("f32-dense", "peft"), dir)}
    end

    test "with what cannot be applied", %{folder: folder} do
      original = Fixtures.read_json(Path.join(folder, @config))

      for {field, value} <- [
            {"modules_to_save", ["score"]},
            {"bias", "all"},
            {"lora_bias", true},
            {"layer_replication", [[0, 2]]},
            {"trainable_token_indices", [1]},
            {"peft_type", "IA3"},
            {"peft_type", nil}
          ] do
        Fixtures.edit_json(folder, @config, fn _config -> Map.put(original, field, value) end)
        assert_refused_at_load(folder, :unsupported, [field, @config])
      end
    end

    test "with a configuration that is none", %{folder: folder} do
      original = Fixtures.read_json(Path.join(folder, @config))

      for {field, value} <- [
            {"r", 0},
            {"r", "4"},
            {"lora_alpha", nil},
            {"rank_pattern", %{"q_proj" => -1}},
            {"alpha_pattern", %{"(" => 1}}
          ] do
        Fixtures.edit_json(folder, @config, fn _config -> Map.put(original, field, value) end)
        assert_refused_at_load(folder, :bad_adapter, @config)
      end
    end

    test "with half of a pair, strange tensors, DoRA's where there is none", %{folder: folder} do
      tensors = "adapter_model.safetensors"
      module = "base_model.model.model.layers.0.self_attn.q_proj"

      for {name, words} <- [
            {"#{module}.lora_B.bias", "lora_B.bias"},
            {"#{module}.lora_magnitude_vector", "DoRA"},
            {"model.layers.0.self_attn.k_proj.lora_A.weight", "k_proj"},
            {"base_model.model.score.base_layer.weight", "score"}
          ] do
        copy = Fixtures.copy(folder, Path.dirname(folder))
        Fixtures.edit_tensor_list(copy, tensors, &[{name, "F32", [1], <<0::32>>} | &1])
        assert_refused_at_load(copy, :bad_adapter, [words, tensors])
      end
    end

    test "for another rank, or another model", %{folder: folder} = context do
      # f32-tied has other sizes.
      assert_refused_at_use(context, folder, ["down_proj.lora_A.weight", "[4, 96]", "[4, 128]"])

      Fixtures.edit_json(folder, @config, &Map.put(&1, "rank_pattern", %{"v_proj" => 3}))
      assert_refused_at_use(context, folder, ["v_proj.lora_A.weight", "[4, 64]", "[3, 64]"])
    end
  end

  test "a checkpoint of a training is loaded by its path", %{folder: folder, model: model} do
    checkpoint = Path.join(folder, "0000100_adapters.safetensors")
    File.cp!(Path.join(folder, @tensors), checkpoint)
    expected = score(model, Bombus.load_adapter!(folder))
    File.write!(Path.join(folder, @tensors), "of another time")
    assert score(model, Bombus.load_adapter!({:local, checkpoint})) == expected
    assert score(model, Bombus.load_adapter!(checkpoint)) == expected
    assert {:error, %Error{reason: :not_found}} = Bombus.load_adapter(checkpoint <> "x")
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
