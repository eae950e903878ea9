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

  # Every row of float32 numbers, and behind it the same with the other sign.
  defp beside_negated(data, columns) do
    for <<row::binary-size(4 * columns) <- data>>, into: <<>> do
      row <> for <<number::float-32-little <- row>>, into: <<>>, do: <<-number::float-32-little>>
    end
  end

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

  test "with modules that its configuration does not name", %{folder: folder} = context do
    original = Fixtures.read_json(Path.join(folder, @config))

    for config <- [
          put_in(original["lora_parameters"]["keys"], ["self_attn.q_proj"]),
          put_in(original["lora_parameters"]["keys"], ["model.layers.0.self_attn.v_proj"])
        ] do
      Fixtures.edit_json(folder, @config, fn _config -> config end)
      words = ["`num_layers` and `keys`", "`model.layers.1.self_attn.v_proj`"]
      assert_refused_at_use(context, folder, words)
    end

    for {num_layers, keys} <- [{"1", []}, {0.5, []}, {1, "self_attn.q_proj"}, {1, [1]}] do
      config = put_in(original["lora_parameters"]["keys"], keys)
      Fixtures.edit_json(folder, @config, fn _ -> Map.put(config, "num_layers", num_layers) end)
      assert_refused_at_load(folder, :bad_adapter, @config)
    end
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

    test "that fits a changed base model", %{folder: folder} do
      original = Fixtures.read_json(Path.join(folder, @config))

      edit = fn kind ->
        Fixtures.edit_json(folder, @config, fn _ ->
          Map.put(original, "init_lora_weights", kind)
        end)
      end

      for kind <- ["pissa", "pissa_niter_16", "PiSSA", "olora", "corda", "lora_ga"] do
        edit.(kind)
        words = ["`init_lora_weights` of `#{kind}`", "path_initial_model_for_weight_conversion"]
        assert_refused_at_load(folder, :unsupported, words)
      end

      edit.("loftq")
      assert_refused_at_load(folder, :unsupported, ["`loftq`", "merge_and_unload"])
      edit.("something_new")
      assert_refused_at_load(folder, :unsupported, ["`something_new`", "not known"])
      edit.(5)
      assert_refused_at_load(folder, :bad_adapter, "got: 5")

      for kind <- [true, false, nil, "gaussian", "eva", "orthogonal", "mica"] do
        edit.(kind)
        assert %{rank: 4} = Bombus.load_adapter!(folder)
      end
    end

    # PEFT's save_pretrained(path_initial_model_for_weight_conversion: ...): [A | A0], [B | -B0],
    # with twice the rank and the alpha. Where A0 and B0 are A and B, nothing is left.
    test "that was converted", %{folder: folder} do
      model = Bombus.load_model!(Fixtures.checkpoint("f32-dense"))
      {:ok, without} = score(model, nil)
      {:ok, with_adapter} = score(model, Bombus.load_adapter!(folder))
      assert Enum.zip_with(without, with_adapter, &abs(&1 - &2)) |> Enum.max() > 1.0e-3

      Fixtures.edit_json(folder, @config, fn config ->
        Map.merge(config, %{
          "r" => config["r"] * 2.0,
          "lora_alpha" => config["lora_alpha"] * 2,
          "corda_config" => %{"corda_method" => "ipm"}
        })
      end)

      Fixtures.edit_tensor_list(folder, "adapter_model.safetensors", fn tensors ->
        for {name, "F32", [rows, columns], data} <- tensors do
          if name =~ "lora_A",
            do: {name, "F32", [2 * rows, columns], data <> data},
            else: {name, "F32", [rows, 2 * columns], beside_negated(data, columns)}
        end
      end)

      {:ok, converted} = score(model, Bombus.load_adapter!(folder))
      assert Enum.zip_with(without, converted, &abs(&1 - &2)) |> Enum.max() < 1.0e-5
    end

    test "numbers, flags and null as Python writes them", %{folder: folder} do
      model = Bombus.load_model!(Fixtures.checkpoint("f32-dense"))
      {:ok, expected} = score(model, Bombus.load_adapter!(folder))
      original = Fixtures.read_json(Path.join(folder, @config))

      for changes <- [
            %{"r" => 4.0, "lora_alpha" => original["lora_alpha"] * 1.0},
            %{"use_dora" => nil, "use_rslora" => nil, "bias" => nil, "lora_bias" => nil},
            %{
              "use_dora" => 0,
              "use_rslora" => 0.0,
              "rank_pattern" => nil,
              "alpha_pattern" => nil
            },
            %{"modules_to_save" => [], "target_parameters" => [], "layer_replication" => nil},
            %{"fan_in_fan_out" => true, "megatron_core" => "x", "a_new_field" => "of tomorrow"},
            %{"lorap_emb_lr" => 1.0e-6, "lora_dropout" => 0.05, "layers_to_transform" => [0, 1]},
            %{"rank_pattern" => %{"nothing_like_it" => 7.0}},
            %{"use_something" => false, "new_config" => nil, "lora_thing" => %{}}
          ] do
        Fixtures.edit_json(folder, @config, fn _config -> Map.merge(original, changes) end)
        assert score(model, Bombus.load_adapter!(folder)) == {:ok, expected}
      end

      # PEFT takes 8 where r or lora_alpha is missing: here alpha is twice the rank 4.
      Fixtures.edit_json(folder, @config, fn _config -> Map.delete(original, "lora_alpha") end)
      assert Bombus.load_adapter!(folder).scale == 2.0
    end

    test "with fields that may change the arithmetic", %{folder: folder} do
      original = Fixtures.read_json(Path.join(folder, @config))

      for {field, value} <- [
            {"use_something", true},
            {"wonder_config", %{"x" => 1}},
            {"lora_nums", 4},
            {"enable_lora", [true, false]},
            {"kasa_config", %{"beta" => 0.1}},
            {"velora_config", %{"num_groups" => 2}},
            {"monteclora_config", %{"num_samples" => 8}},
            {"use_bdlora", %{"nblocks" => 2}},
            {"use_qalora", true},
            {"alora_invocation_tokens", [1, 2]},
            {"arrow_config", %{"top_k" => 1}},
            {"target_parameters", ["mlp.experts"]},
            {"modules_to_save", List.duplicate("lm_head", 1000)},
            {"bias", true},
            {"bias", "lora_only"},
            {"peft_type", "ADALORA"},
            {"peft_type", String.duplicate("X", 10_000)}
          ] do
        Fixtures.edit_json(folder, @config, fn _config -> Map.put(original, field, value) end)
        assert {:error, %Error{} = error} = Bombus.load_adapter(folder)
        assert error.reason == :unsupported
        assert error.message =~ "`#{field}`" or error.message =~ field
        assert byte_size(error.message) < 800
      end
    end

    @tag timeout: 30_000
    test "with patterns that are hostile", %{folder: folder} do
      original = Fixtures.read_json(Path.join(folder, @config))
      many = Map.new(1..100_000, &{"layers\\.#{&1}\\..*", 2})

      for {field, value, words} <- [
            {"rank_pattern", %{"q_proj" => 0.5}, "`rank_pattern` of \"q_proj\""},
            {"rank_pattern", %{"q_proj" => 0}, "whole number from 1"},
            {"rank_pattern", %{"q_proj" => "4"}, "got: \"4\""},
            {"rank_pattern", ["q_proj"], "`rank_pattern` to be an object"},
            {"rank_pattern", many, "100000 patterns"},
            {"rank_pattern", %{"(a+)+b{1000}{1000}" => 4}, "too large"},
            {"alpha_pattern", %{String.duplicate("a", 1000) => 4}, "512 bytes"},
            {"alpha_pattern", %{"(.+)(.+)(.+)(.+)(.+)(.+)\\6\\5\\4\\3\\2\\1!" => 4},
             "too many steps"},
            {"alpha_pattern", %{"q_proj" => nil}, "`alpha_pattern` of \"q_proj\""}
          ] do
        Fixtures.edit_json(folder, @config, fn _config -> Map.put(original, field, value) end)

        for scale <- [nil, 2.0] do
          assert {:error, %Error{reason: :bad_adapter} = error} =
                   Bombus.load_adapter(folder, scale: scale)

          assert error.message =~ words
        end
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

    test "modules that the configuration does not name are left out, as the log says", context do
      %{folder: folder} = context
      model = Bombus.load_model!(Fixtures.checkpoint("f32-dense"), device: :cpu)
      whole = score(model, Bombus.load_adapter!(folder))
      less = Fixtures.copy(folder, Path.dirname(folder))

      Fixtures.edit_tensor_list(less, "adapter_model.safetensors", fn tensors ->
        Enum.reject(tensors, fn {name, _, _, _} -> name =~ ~r/v_proj|layers.0/ end)
      end)

      expected = score(model, Bombus.load_adapter!(less))
      assert expected != whole

      for changes <- [
            %{
              "target_modules" => ["layers.1.self_attn.q_proj", "down_proj"],
              "layers_to_transform" => [1]
            },
            %{
              "exclude_modules" => ["v_proj"],
              "layers_to_transform" => 1,
              "layers_pattern" => "layers"
            },
            %{"target_modules" => ".*\\.1\\..*(q|down)_proj"}
          ] do
        Fixtures.edit_json(folder, @config, fn config ->
          config
          |> Map.put("target_modules", ["q_proj", "down_proj", "v_proj"])
          |> Map.merge(changes)
        end)

        log =
          ExUnit.CaptureLog.capture_log(fn ->
            assert score(model, Bombus.load_adapter!(folder)) == expected
          end)

        assert log =~ "left out: `model.layers.0.mlp.down_proj`"
        Fixtures.edit_json(folder, @config, &Map.drop(&1, Map.keys(changes)))
      end

      Fixtures.edit_json(folder, @config, &Map.put(&1, "target_modules", ["up_proj"]))
      assert_refused_at_load(folder, :bad_adapter, ["`target_modules`", @config])
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

  test "a scale of one's own counts, and 0 is none", %{folder: folder, model: model} = context do
    adapter = Bombus.load_adapter!(folder, scale: 1.0e-30)
    assert_in_delta adapter.scale, 1.0e-30, 1.0e-36
    assert score(model, adapter) == {:ok, context.before}
    assert score(model, Bombus.load_adapter!(folder)) != {:ok, context.before}

    for scale <- [0, 0.0, -0.0] do
      assert_raise ArgumentError,
                   ~r/:scale to be a number other than 0, got: .*adapter: nil/,
                   fn ->
                     Bombus.load_adapter(folder, scale: scale)
                   end
    end

    assert_raise ArgumentError, ~r/:scale to be a number within float32/, fn ->
      Bombus.load_adapter(folder, scale: 1.0e-50)
    end
  end

  test "numbers and null as Python writes them", %{folder: folder, model: model} do
    expected = score(model, Bombus.load_adapter!(folder))

    Fixtures.edit_json(folder, @config, fn config ->
      parameters = config["lora_parameters"]

      parameters = %{
        parameters
        | "rank" => parameters["rank"] * 1.0,
          "scale" => trunc(parameters["scale"])
      }

      %{config | "lora_parameters" => parameters, "num_layers" => nil, "fine_tune_type" => nil}
    end)

    assert score(model, Bombus.load_adapter!(folder)) == expected
  end

  test "the error names the field and the value", %{folder: folder} do
    original = Fixtures.read_json(Path.join(folder, @config))

    for {field, value, words} <- [
          {"rank", 0.5, "`rank` to be a whole number from 1 to 65536, got: 0.5"},
          {"rank", "4", "got: \"4\""},
          {"rank", true, "got: true"},
          {"rank", -4, "got: -4"},
          {"rank", 1.0e18, "`rank`"},
          {"scale", "20", "`scale` to be a finite number, got: \"20\""},
          {"scale", [], "got: []"},
          {"scale", 1.0e39, "`scale` to be a finite number"}
        ] do
      Fixtures.edit_json(folder, @config, fn _config ->
        put_in(original["lora_parameters"][field], value)
      end)

      assert_refused_at_load(folder, :bad_adapter, [words, @config])
    end

    Fixtures.edit_json(folder, @config, fn _config ->
      update_in(original["lora_parameters"], &(&1 |> Map.delete("scale") |> Map.put("alpha", 16)))
    end)

    assert_refused_at_load(folder, :bad_adapter, ["`scale` is missing", "`alpha`"])
    Fixtures.edit_json(folder, @config, fn _config -> [] end)
    assert_refused_at_load(folder, :bad_adapter, "an object")
  end

  test "with numbers that are not finite", %{folder: folder} do
    for {name, bits} <- [{"lora_a", <<0, 0, 0xC0, 0x7F>>}, {"lora_b", <<0, 0, 0x80, 0xFF>>}] do
      copy = Fixtures.copy(folder, Path.dirname(folder))

      Fixtures.edit_tensor_list(copy, @tensors, fn tensors ->
        for {tensor, "F32", shape, <<_first::4-binary, data::binary>>} <- tensors do
          bits = if tensor =~ name, do: bits, else: <<0::32>>
          {tensor, "F32", shape, bits <> data}
        end
      end)

      assert_refused_at_load(copy, :bad_adapter, [name, "NaN or infinite", @tensors])
    end
  end

  test "an error lists the first tensors that do not fit", context do
    folder = Fixtures.copy(Fixtures.adapter("bf16-4bit", "all-layers"), context.tmp_dir)
    adapter = Bombus.load_adapter!(folder)
    assert {:error, %Error{message: message}} = score(context.model, adapter)
    assert message =~ ~r/; and \d+ more$/
    assert byte_size(message) < 1500
  end

  test "a folder with something else says what to do", %{tmp_dir: dir} do
    for {file, words} <- [
          {"adapter_model.bin", "safe_serialization"},
          {"adapters.npz", "old mlx-lm"},
          {"config.json", "load_model"}
        ] do
      folder = Path.join(dir, "with-" <> file)
      File.mkdir_p!(folder)
      File.write!(Path.join(folder, file), "{}")
      assert_refused_at_load(folder, :not_found, [words, @tensors])
    end
  end
end
