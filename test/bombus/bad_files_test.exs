defmodule Bombus.BadFilesTest do
  # Every line of "Files": a clear error that names file, tensor or field, and a model that was
  # loaded before still answers.
  use ExUnit.Case, async: true

  alias Bombus.{Error, Fixtures}

  @moduletag :tmp_dir
  @tensors "model.safetensors"

  setup_all {Fixtures, :answering_model}

  setup %{tmp_dir: dir} do
    %{folder: Fixtures.copy(Fixtures.checkpoint("f32-tied"), dir)}
  end

  defp assert_refused(context, folder, reason, words) do
    assert {:error, %Error{} = error} = Bombus.load_model({:local, folder})
    assert error.reason == reason, Exception.message(error)
    for word <- List.wrap(words), do: assert(error.message =~ word)
    assert Bombus.score(context.model, [1, 2, 3, 4]) == {:ok, context.before}
  end

  defp raw(folder, header, data \\ "") do
    Fixtures.write_tensors(Path.join(folder, @tensors), header, data)
    folder
  end

  test "a link that leads nowhere is no file that is absent", %{folder: folder} = context do
    for {file, target, words} <- [
          {"generation_config.json", "nothing", "a link to `nothing`, which is not there"},
          {"config.json", "config.json", "a link to `config.json`, which leads back to it"}
        ] do
      copy = Fixtures.copy(folder, Path.dirname(folder))
      File.rm(Path.join(copy, file))
      File.ln_s!(target, Path.join(copy, file))
      assert_refused(context, copy, :io, [file, words])
    end

    demo = Application.app_dir(:bombus, "priv/models/demo")

    for file <- ["tokenizer_config.json", "added_tokens.json", "chat_template.jinja"] do
      copy = Fixtures.copy(demo, Path.dirname(folder))
      File.rm(Path.join(copy, file))
      File.ln_s!("nothing", Path.join(copy, file))
      assert {:error, %Error{reason: :io, message: message}} = Bombus.load_tokenizer(copy)
      assert message =~ file and message =~ "a link to `nothing`"
    end
  end

  test "what of a configuration is not followed is logged", %{folder: folder} do
    generation = %{suppress_tokens: [3], eos_token_id: [1, 99_999]}
    File.write!(Path.join(folder, "generation_config.json"), JSON.encode!(generation))
    load = fn -> Bombus.load_model!(folder, device: :cpu) end
    log = ExUnit.CaptureLog.capture_log(load)
    assert log =~ "`suppress_tokens` ([3])"
    assert log =~ "`eos_token_id`: no token of the vocabulary of 256 is 99999"
  end

  describe "a safetensors header" do
    test "that is cut off", %{folder: folder} = context do
      File.write!(Path.join(folder, @tensors), <<1, 2, 3>>)
      assert_refused(context, folder, :bad_checkpoint, [@tensors, "too short"])
    end

    test "that is empty", %{folder: folder} = context do
      File.write!(Path.join(folder, @tensors), "")
      assert_refused(context, folder, :bad_checkpoint, @tensors)
    end

    test "that says it is longer than the file", %{folder: folder} = context do
      File.write!(Path.join(folder, @tensors), <<1_000_000::little-64, "{}">>)
      assert_refused(context, folder, :bad_checkpoint, [@tensors, "header length"])
    end

    test "that says it is enormous", %{folder: folder} = context do
      File.write!(Path.join(folder, @tensors), <<0xFFFFFFFFFFFFFFFF::little-64, "{}">>)
      assert_refused(context, folder, :bad_checkpoint, [@tensors, "too large"])
    end

    test "that is not UTF-8", %{folder: folder} = context do
      assert_refused(context, raw(folder, <<?{, 0xFF, 0xFE, ?}>>), :bad_checkpoint, "UTF-8")
    end

    test "that is not JSON", %{folder: folder} = context do
      assert_refused(context, raw(folder, "{\"a\":"), :bad_checkpoint, "JSON")
    end

    test "with a name that stands twice", %{folder: folder} = context do
      entry = ~s({"dtype":"F32","shape":[1],"data_offsets":[0,4]})
      header = ~s({"a":#{entry},"a":#{entry}})
      assert_refused(context, raw(folder, header, <<0::32>>), :bad_checkpoint, "`a` stands twice")
    end

    test "with an unknown dtype", %{folder: folder} = context do
      header = ~s({"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}})
      assert_refused(context, raw(folder, header, <<0::32>>), :bad_checkpoint, "X9")
    end

    test "with a shape that overflows", %{folder: folder} = context do
      huge = 0xFFFFFFFFFFFFFFF
      header = ~s({"a":{"dtype":"F32","shape":[#{huge},#{huge}],"data_offsets":[0,4]}})
      assert_refused(context, raw(folder, header, <<0::32>>), :bad_checkpoint, "overflow")
    end

    for {name, second, size} <- [
          {"that overlap", "[2,6]", 6},
          {"that leave a hole", "[8,12]", 12},
          {"that pass the end", "[4,4000]", 8},
          {"that do not reach the end", "[4,8]", 64}
        ] do
      test "with offsets #{name}", %{folder: folder} = context do
        first = ~s("a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]})
        second = ~s("b":{"dtype":"F32","shape":[1],"data_offsets":#{unquote(second)}})
        broken = raw(folder, "{#{first},#{second}}", <<0::size(unquote(size))-unit(8)>>)
        assert_refused(context, broken, :bad_checkpoint, @tensors)
      end
    end

    test "of a file that was cut off behind it", %{folder: folder} = context do
      path = Path.join(folder, @tensors)
      File.write!(path, path |> File.read!() |> binary_part(0, 20_000))
      assert_refused(context, folder, :bad_checkpoint, @tensors)
    end
  end

  describe "shards" do
    setup %{tmp_dir: dir} do
      %{shards: Fixtures.copy(Fixtures.checkpoint("f32-three-shards"), dir)}
    end

    test "of which one is missing", %{shards: shards} = context do
      File.rm!(Path.join(shards, "model-00002-of-00003.safetensors"))
      assert_refused(context, shards, :not_found, "model-00002-of-00003.safetensors")
    end

    test "of which one is missing, without an index", %{shards: shards} = context do
      File.rm!(Path.join(shards, "model-00002-of-00003.safetensors"))
      File.rm!(Path.join(shards, "model.safetensors.index.json"))
      assert_refused(context, shards, :bad_checkpoint, "2 of 3 shards")
    end

    test "load without an index too", %{shards: shards} do
      File.rm!(Path.join(shards, "model.safetensors.index.json"))
      assert {:ok, _model} = Bombus.load_model(shards)
    end
  end

  describe "tensors" do
    test "that are missing", %{folder: folder} = context do
      without(folder, "model.layers.1.mlp.up_proj.weight")
      assert_refused(context, folder, :bad_checkpoint, "model.layers.1.mlp.up_proj.weight")
    end

    test "that lack their biases", %{folder: folder} = context do
      without(folder, "model.layers.0.mlp.up_proj.biases")
      assert_refused(context, folder, :bad_checkpoint, "model.layers.0.mlp.up_proj.biases")
    end

    test "whose scales do not fit the weight", %{folder: folder} = context do
      reshape(folder, "model.layers.0.mlp.up_proj.scales", fn dtype, [rows, columns], data ->
        {dtype, [rows, columns * 3], data <> data <> data}
      end)

      assert_refused(context, folder, :bad_checkpoint, "model.layers.0.mlp.up_proj")
    end

    test "of the wrong shape", %{folder: folder} = context do
      reshape(folder, "model.norm.weight", fn dtype, [size], data ->
        {dtype, [1, size], data}
      end)

      assert_refused(context, folder, :bad_checkpoint, ["model.norm.weight", "shape"])
    end

    test "of the wrong type", %{folder: folder} = context do
      reshape(folder, "model.norm.weight", fn "F32", shape, data -> {"I32", shape, data} end)
      assert_refused(context, folder, :bad_checkpoint, ["model.norm.weight", "I32"])
    end

    test "that no module takes", %{folder: folder} = context do
      Fixtures.edit_tensor_list(folder, @tensors, fn tensors ->
        [{"model.layers.0.self_attn.q_proj.bias", "F32", [1], <<0::32>>} | tensors]
      end)

      assert_refused(context, folder, :bad_checkpoint, "model.layers.0.self_attn.q_proj.bias")
    end
  end

  describe "config.json" do
    for {field, value, reason, word} <- [
          {"hidden_size", nil, :bad_config, "hidden_size"},
          {"hidden_size", 10_000_000_000, :bad_config, "hidden_size"},
          {"num_hidden_layers", "two", :bad_config, "num_hidden_layers"},
          {"num_attention_heads", 0, :bad_config, "num_attention_heads"},
          {"num_key_value_heads", 3, :bad_config, "num_key_value_heads"},
          {"num_key_value_heads", -1, :bad_config, "num_key_value_heads"},
          {"vocab_size", 1.5, :bad_config, "vocab_size"},
          {"vocab_size", 512, :bad_checkpoint, "model.embed_tokens.weight"},
          {"rms_norm_eps", "small", :bad_config, "rms_norm_eps"},
          {"tie_word_embeddings", "yes", :bad_config, "tie_word_embeddings"},
          {"tie_word_embeddings", false, :bad_checkpoint, "lm_head.weight"},
          {"eos_token_id", "end", :bad_config, "eos_token_id"},
          {"head_dim", 7, :bad_config, "head_dim"},
          {"model_type", nil, :bad_config, "model_type"},
          {"model_type", "gemma3", :bad_config, "text_config"},
          {"model_type", "qwen2", :bad_checkpoint, "q_proj.bias"},
          {"model_type", "mystery", :unsupported, "mystery"},
          {"model_file", "evil.py", :unsupported, "model_file"},
          {"quantization", %{"group_size" => 64}, :bad_config, "bits"},
          {"quantization", %{"group_size" => 64, "bits" => 7}, :bad_config, "bits"},
          {"quantization", %{"group_size" => 48, "bits" => 4}, :bad_config, "group_size"},
          {"quantization", "4bit", :bad_config, "quantization"},
          {"rope_scaling", %{"rope_type" => "yarn"}, :bad_config, "factor"},
          {"rope_scaling", %{"rope_type" => "longrope"}, :bad_config, "long_factor"},
          {"rope_scaling", %{"rope_type" => "proportional"}, :unsupported, "proportional"}
        ] do
      test "with #{field}: #{inspect(value)}", %{folder: folder} = context do
        {field, value} = unquote({field, Macro.escape(value)})
        Fixtures.edit_json(folder, "config.json", &Map.put(&1, field, value))
        assert_refused(context, folder, unquote(reason), unquote(word))
      end
    end

    test "with a quantization that its tensors do not have", %{folder: folder} = context do
      Fixtures.edit_json(folder, "config.json", fn config ->
        put_in(config["quantization"]["model.layers.0.mlp.up_proj"], %{
          "group_size" => 64,
          "bits" => 8
        })
      end)

      assert_refused(context, folder, :bad_checkpoint, "model.layers.0.mlp.up_proj")
    end

    test "that is missing", %{folder: folder} = context do
      File.rm!(Path.join(folder, "config.json"))
      assert_refused(context, folder, :not_found, "config.json")
    end

    test "that is no JSON object", %{folder: folder} = context do
      for text <- ["", "[1]", "{", <<0xFF>>] do
        File.write!(Path.join(folder, "config.json"), text)
        assert_refused(context, folder, :bad_config, "config.json")
      end
    end
  end

  test "no weights at all", %{folder: folder} = context do
    File.rm!(Path.join(folder, @tensors))
    assert_refused(context, folder, :not_found, @tensors)
  end

  test "no folder, or a file in its place", %{folder: folder} = context do
    assert_refused(context, Path.join(folder, "nothing"), :not_found, "nothing")
    assert_refused(context, Path.join(folder, "config.json"), :not_found, "is a file")
  end

  test "an adapter's file that is cut off before it is first used", context do
    %{model: model, before: before, tmp_dir: dir} = context
    folder = Fixtures.copy(Fixtures.adapter("f32-tied", "last-qv"), dir)
    adapter = Bombus.load_adapter!(folder)
    File.write!(Path.join(folder, "adapters.safetensors"), "")
    assert {:error, %Error{reason: :io} = error} = Bombus.score(model, [1, 2], adapter: adapter)
    assert error.message =~ "adapters.safetensors"
    assert Bombus.score(model, [1, 2, 3, 4]) == {:ok, before}
  end

  describe "a tokenizer" do
    setup %{tmp_dir: dir} do
      demo = Application.app_dir(:bombus, "priv/models/demo")
      %{demo: Fixtures.copy(demo, dir)}
    end

    test "that is missing or broken", %{demo: demo} do
      File.write!(Path.join(demo, "tokenizer.json"), "{\"model\": 1}")
      assert {:error, %Error{reason: :bad_tokenizer} = error} = Bombus.load_tokenizer(demo)
      assert error.message =~ "tokenizer.json"
      File.rm!(Path.join(demo, "tokenizer.json"))
      assert {:error, %Error{reason: :not_found}} = Bombus.load_tokenizer(demo)
    end

    test "with a broken chat template", %{demo: demo} do
      Fixtures.edit_json(demo, "tokenizer_config.json", &Map.put(&1, "chat_template", "{% if %}"))
      File.rm(Path.join(demo, "chat_template.jinja"))
      assert {:error, %Error{reason: :bad_tokenizer} = error} = Bombus.load_tokenizer(demo)
      assert error.message =~ "chat template"
    end
  end

  defp without(folder, name) do
    Fixtures.edit_tensor_list(folder, @tensors, fn tensors ->
      Enum.reject(tensors, &(elem(&1, 0) == name))
    end)
  end

  defp reshape(folder, name, fun) do
    Fixtures.edit_tensor_list(folder, @tensors, fn tensors ->
      Enum.map(tensors, fn
        {^name, dtype, shape, data} -> Tuple.insert_at(fun.(dtype, shape, data), 0, name)
        tensor -> tensor
      end)
    end)
  end
end
